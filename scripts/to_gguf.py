"""A checkpoint as GGUF by llama.cpp's own converter, also of families for which it expects a BPE tokenizer.

    python scripts/to_gguf.py LLAMA_CPP CHECKPOINT OUT.gguf [options of the converter]

LLAMA_CPP is a clone of llama.cpp with its Python requirements installed. For Qwen2-MoE and GLM-4-MoE its converter knows a
tokenizer by a hash of what it makes of a test text, which no tokenizer that you have trained can match. Where the
checkpoint has a `tokenizer.model`, this has the converter read that instead, as it does for Mixtral.

llama.cpp does not renormalise the weights of Qwen2-MoE's experts, so a checkpoint with `norm_topk_prob` is refused there.
"""

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    llama_cpp, checkpoint, out = (Path(word) for word in sys.argv[1:4])
    converter = llama_cpp / "convert_hf_to_gguf.py"
    for needed in (converter, checkpoint / "config.json"):
        if not needed.is_file():
            raise SystemExit(f"{needed} is missing: give a clone of llama.cpp and a checkpoint directory")
    content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if content.get("model_type") == "qwen2_moe" and content.get("norm_topk_prob"):
        raise SystemExit("norm_topk_prob=true is not what llama.cpp computes for Qwen2-MoE: its answers would be wrong")
    sys.path.insert(0, str(llama_cpp))
    if (checkpoint / "tokenizer.model").is_file():
        from conversion.base import TextModel

        settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))

        def sentencepiece(model: TextModel) -> None:
            model._set_vocab_sentencepiece()
            if settings.get("add_prefix_space") is not None:  # as the converter has it for Mixtral
                model.gguf_writer.add_add_space_prefix(settings["add_prefix_space"])

        TextModel._set_vocab_gpt2 = TextModel._set_vocab_glm = sentencepiece
    sys.argv = [str(converter), str(checkpoint), "--outfile", str(out), *sys.argv[4:]]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main()
