function showNeighbours(view, tokens) {
  const panel = view.querySelector(".neighbours"), buttons = view.querySelectorAll(".tokens button");
  const number = (x) => x === null ? "0" : x >= 0.001 ? x.toFixed(3) : x.toExponential(1);
  const cell = (row, text, tag = "td") => { const c = document.createElement(tag); c.textContent = text;
    row.append(c); return c; };
  const named = new Set(tokens.flatMap((t) => t.neighbours.map((n) => n.store))).size > 1;
  function show(i) {
    buttons.forEach((b, j) => b.classList.toggle("chosen", i === j));
    const t = tokens[i], title = document.createElement("p"), table = document.createElement("table");
    title.textContent = `${JSON.stringify(t.text)}: p_LM ${number(t.p_lm)}, p_kNN ${number(t.p_knn)}, ` +
      `mixture ${number(t.p)}` + (t.searched ? "" : " (no search)");
    const head = table.insertRow();
    for (const name of ["weight", "distance", ...(named ? ["store"] : []), "document", "entry", "context and value"]) cell(head, name, "th");
    for (const n of t.neighbours) {
      const row = table.insertRow();
      cell(row, n.weight.toFixed(4)); cell(row, n.distance.toFixed(1));
      if (named) cell(row, n.store);
      cell(row, n.document ?? ""); cell(row, n.entry);
      const text = cell(row, n.context), mark = document.createElement("mark");
      mark.textContent = n.value; text.append(mark);
    }
    panel.replaceChildren(title, table);
  }
  buttons.forEach((b, i) => b.addEventListener("click", () => show(i)));
  if (tokens.length) show(tokens.reduce((best, t, i) => t.gain > tokens[best].gain ? i : best, 0));
}
