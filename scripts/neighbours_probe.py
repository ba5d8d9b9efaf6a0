"""What one tool of others makes of one checkpoint: token ids and losses. Run by `scripts/neighbours.py`.

    python scripts/neighbours_probe.py TOOL REQUEST.json RESULT.json

It imports nothing of this package, so that it runs where another transformers is installed. A request has
`checkpoint`, `texts` or `conversations`, `remote_code`, `folder` (to write into), and for an adapter `base` and `adapter`.
A result has `versions`, `ids` and `losses` (nats a token, fp32) for each text, or `error`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

Request = dict[str, Any]
Found = dict[str, Any]
CLOSE = 1e-5


def tokenizer_of(request: Request, folder: str | None = None) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder or request["checkpoint"], **({"trust_remote_code": True} if request["remote_code"] else {})
    )


def model_of(request: Request, folder: str | None = None, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True} if request["remote_code"] else {}
    return AutoModelForCausalLM.from_pretrained(
        folder or request["checkpoint"], torch_dtype=torch.float32, **options, **more
    ).eval()


def encoded(request: Request, tokenizer: Any, **options: Any) -> Any:
    """All texts, or conversations by the checkpoint's own chat template."""
    if "conversations" in request:
        return tokenizer.apply_chat_template(request["conversations"], tokenize=True, return_dict=True, **options)
    return tokenizer(request["texts"], **options)


def nats(logits_SV: torch.Tensor, ids: list[int]) -> float:
    return float(F.cross_entropy(logits_SV[: len(ids) - 1].float(), torch.tensor(ids[1:])))


@torch.no_grad()
def losses_of(model: Any, rows: list[list[int]]) -> list[float]:
    """Each row by itself, as the model's own `labels` have it."""
    return [float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in rows]


def transformers(request: Request) -> Found:
    """Padded in one batch; one by one with labels must give the same."""
    tokenizer = tokenizer_of(request)
    if "adapter" in request and version("transformers") >= "5":
        model = model_of(request, request["base"])
        model.load_adapter(request["adapter"])
    else:
        model = model_of(request)
    ids = encoded(request, tokenizer)["input_ids"]
    batch = encoded(request, tokenizer, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits_BSV = model(**batch).logits
    padded = [nats(row, one) for row, one in zip(logits_BSV, ids)]
    alone = losses_of(model, ids)
    _same(padded, alone, "a padded batch and single rows")
    return {"ids": ids, "losses": alone}


def peft(request: Request) -> Found:
    """The adapter over its base; on others a new one that changes nothing. Merged into the weights it must stay the same."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if "adapter" in request:
        model = PeftModel.from_pretrained(model_of(request, request["base"]), request["adapter"]).eval()
    else:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model_of(request), config).eval()
    ids = encoded(request, tokenizer_of(request))["input_ids"]
    losses = losses_of(model, ids)
    if "adapter" not in request:
        torch.manual_seed(0)
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(factor, std=0.1)
    tuned = losses_of(model, ids)
    _same(losses_of(model.merge_and_unload(), ids), tuned, "an adapter merged and as it is")
    return {"ids": ids, "losses": losses}


def trl(request: Request) -> Found:
    """`SFTTrainer`: what its own data preparation and loss make of the rows, and one step of training."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(0)
    more = {"router_aux_loss_coef": 0.0}  # TRL adds the balance loss by itself
    if "adapter" in request:
        from peft import PeftModel

        base = model_of(request, request["base"], **more)
        model = PeftModel.from_pretrained(base, request["adapter"], is_trainable=True)
    else:
        model = model_of(request, **more)
    rows = (
        [{"messages": talk} for talk in request["conversations"]]
        if "conversations" in request
        else [{"text": text} for text in request["texts"]]
    )
    arguments = SFTConfig(
        output_dir=str(Path(request["folder"]) / "trl"), per_device_train_batch_size=len(rows), max_steps=1,
        max_length=None, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer_of(request)
    )
    ids = [list(row["input_ids"]) for row in trainer.train_dataset]
    losses = []
    trainer.model.eval()
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, dict(batch))))
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    counts = [len(one) - 1 for one in ids]
    mean = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
    _same([logged], [mean], "the step's loss and the rows'", 1e-3)  # it logs few digits
    return {"ids": ids, "losses": losses}


def lm_eval(request: Request) -> Found:
    """`HFLM`, the harness's model for transformers: log-likelihoods, batched."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    more = {"peft": request["adapter"]} if "adapter" in request else {}
    lm = HFLM(
        pretrained=request["base"] if "adapter" in request else request["checkpoint"], tokenizer=request["checkpoint"],
        dtype="float32", device="cpu", batch_size=4, trust_remote_code=request["remote_code"], **more,
    )  # fmt: skip
    if "conversations" in request:
        texts = [lm.apply_chat_template(talk, add_generation_prompt=False) for talk in request["conversations"]]
        ids = [lm.tok_encode(text, add_special_tokens=False) for text in texts]
        found = lm._loglikelihood_tokens([((None, None), one[:1], one[1:]) for one in ids])
    else:
        ids = [[lm.prefix_token_id, *lm.tok_encode(text, add_special_tokens=False)] for text in request["texts"]]
        found = lm.loglikelihood(
            [Instance("loglikelihood", {}, ("", text), i) for i, text in enumerate(request["texts"])], disable_tqdm=True
        )
    sums = [answer[0] for answer in found]
    return {"ids": ids, "losses": [-total / (len(one) - 1) for total, one in zip(sums, ids)]}


def mergekit(request: Request) -> Found:
    """The checkpoint averaged with itself in fp32 (an adapter as `BASE+ADAPTER`), read by transformers."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    again = Path(request["folder"]) / "again"  # it takes no model twice under one name
    first = request["base"] if "adapter" in request else request["checkpoint"]
    again.symlink_to(first)
    more = f"+{request['adapter']}" if "adapter" in request else ""
    halves = [{"model": f"{name}{more}", "parameters": {"weight": 0.5}} for name in (first, again)]
    config = {"merge_method": "linear", "models": halves, "dtype": "float32"}
    out = Path(request["folder"]) / "merged"
    options = MergeOptions(
        copy_tokenizer=True, lora_merge_cache=str(Path(request["folder"]) / "lora"), quiet=True,
        trust_remote_code=request["remote_code"],
    )  # fmt: skip
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    for file in Path(first).glob("*.py"):  # it leaves the modelling code behind
        shutil.copyfile(file, out / file.name)
    ids = encoded(request, tokenizer_of(request, str(out)))["input_ids"]
    return {"ids": ids, "losses": losses_of(model_of(request, str(out)), ids)}


def torchao(request: Request) -> Found:
    """Linear layers in int8, weights only, after loading: the loss moves by what rounding costs."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    ids = encoded(request, tokenizer_of(request))["input_ids"]
    model = model_of(request)
    whole = losses_of(model, ids)
    quantize_(model, Int8WeightOnlyConfig())
    losses = losses_of(model, ids)
    if losses == whole:
        raise AssertionError("quantize_ has changed nothing")
    return {"ids": ids, "losses": losses}


def llama_cpp(request: Request) -> Found:
    """The converter's file (and for an adapter, its LoRA converter's over the base's), with a cache in fp32."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    root, work = Path(request["llama_cpp"]), Path(request["folder"])
    source = Path(request["base"] if "adapter" in request else request["checkpoint"])
    script = Path(__file__).parent / "to_gguf.py"
    _convert([script, root, source, work / "model.gguf", "--outtype", "f32"])
    more = {}
    if "adapter" in request:
        words = [root / "convert_lora_to_gguf.py", "--base", source, "--outtype", "f32", "--outfile"]
        _convert([*words, work / "adapter.gguf", request["adapter"]])
        more = {"lora_path": str(work / "adapter.gguf")}
    llama = Llama(
        str(work / "model.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, **more
    )
    if "conversations" in request:
        data = llama.metadata
        form = Jinja2ChatFormatter(
            data["tokenizer.chat_template"], bos_token=llama._model.token_get_text(llama.token_bos()),
            eos_token=llama._model.token_get_text(llama.token_eos()), add_generation_prompt=False,
        )  # fmt: skip
        texts = [form(messages=talk).prompt for talk in request["conversations"]]
    else:
        texts = request["texts"]
    ids, losses = [], []
    for text in texts:
        chat = "conversations" in request
        one = llama.tokenize(text.encode(), add_bos=not chat, special=chat)
        llama.reset()
        llama.eval(one)
        ids.append(one)
        losses.append(nats(torch.tensor(llama.scores[: len(one)]), one))
    return {"ids": ids, "losses": losses}


def vllm(request: Request) -> Found:
    """`LLM` on the CPU: its own tokens and log-probabilities of the prompts. Its adapters need Triton, which has no CPUs."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    checkpoint = request["checkpoint"]
    if json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2_moe":
        checkpoint = str(Path(request["folder"]) / "with-biases")
        _convert([Path(__file__).with_name("to_vllm.py"), request["checkpoint"], checkpoint])
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2,
        trust_remote_code=request["remote_code"],
    )  # fmt: skip
    if "conversations" in request:
        rows = encoded(request, llm.get_tokenizer())["input_ids"]
        prompts: list[Any] = [{"prompt_token_ids": row} for row in rows]
    else:
        prompts = request["texts"]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs, losses = llm.generate(prompts, sampling), []
    for output in outputs:
        chosen = [entry[id_].logprob for entry, id_ in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]
        losses.append(-sum(chosen) / len(chosen))
    return {"ids": [list(output.prompt_token_ids) for output in outputs], "losses": losses}


def _convert(words: list[Any]) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RuntimeError(next((line for line in lines if "ERROR" in line), lines[-1]))


def _same(found: list[float], wanted: list[float], what: str, close: float = CLOSE) -> None:
    for one, other in zip(found, wanted, strict=True):
        if not abs(one - other) <= close * abs(other):
            raise AssertionError(f"{what} differ: {one} and {other}")


# name of the tool -> what measures it, and the packages whose versions are told
PROBES: dict[str, tuple[Callable[[Request], Found], tuple[str, ...]]] = {
    "transformers": (transformers, ("transformers",)),
    "transformers 4": (transformers, ("transformers",)),
    "peft": (peft, ("peft",)),
    "trl": (trl, ("trl",)),
    "lm_eval": (lm_eval, ("lm_eval",)),
    "mergekit": (mergekit, ("mergekit",)),
    "torchao": (torchao, ("torchao",)),
    "llama.cpp": (llama_cpp, ("llama_cpp_python", "gguf")),
    "vllm": (vllm, ("vllm_cpu", "transformers")),
}


def main() -> None:
    tool, request, result = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3])
    probe, packages = PROBES[tool]
    found: Found = {"versions": {name: version(name) for name in packages}}
    try:
        found |= probe(request)
    except Exception as error:  # noqa: BLE001  the cell of the table says it
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        found["error"] = f"{type(error).__name__}: {lines[0]}"
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
