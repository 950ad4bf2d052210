// The details of the token that is clicked, or that the arrow keys lead to.
function showDetails(view) {
  const buttons = [...view.querySelectorAll(".tokens button")], details = view.querySelectorAll("template");
  const panel = view.querySelector(".details");
  function show(i) {
    buttons.forEach((b, j) => b.classList.toggle("chosen", i === j));
    panel.replaceChildren(details[i].content.cloneNode(true));
  }
  const tokens = view.querySelector(".tokens");
  tokens.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(buttons.indexOf(button));
  });
  tokens.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = step && buttons[buttons.indexOf(event.target) + step];
    if (next) { next.focus(); show(buttons.indexOf(next)); event.preventDefault(); }
  });
}
