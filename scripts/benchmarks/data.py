"""The data layer, measured.

    python scripts/benchmarks/data.py prepare --megabytes 1000      # against `tokenizers` on all cores, and memory
    python scripts/benchmarks/data.py kills --megabytes 100         # 20 kills at random moments
    python scripts/benchmarks/data.py loader                        # what it feeds, against what the quickstart takes
    python scripts/benchmarks/data.py packing --steps 240           # best_fit against concat on the quickstart, three seeds

The text is the source of Python's standard library, repeated in another order each time, as JSON lines. `prepare` is the
whole command, process start and checksums included; `tokenizers` is `encode_batch_fast` over the same documents alone. They
take turns, so that another load of the machine meets both. Prints JSON.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOE_LLM = [sys.executable, "-c", "from moe_llm.cli import main; raise SystemExit(main())"]
QUICKSTART = ROOT / "configs/quickstart.yaml"


def write_text(path: Path, megabytes: float) -> None:
    """The standard library's files as JSON lines, shuffled and repeated up to a size."""
    from moe_llm.config import SourceConfig
    from moe_llm.data.sources import read_documents

    texts = list(read_documents(SourceConfig(type="python_stdlib"), "text"))
    rng, left = random.Random(0), megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            for text in rng.sample(texts, len(texts)):
                left -= file.write(json.dumps({"text": text}) + "\n")
                if left <= 0:
                    return


def write_config(folder: Path, text: Path, cache: str) -> Path:
    """The quickstart over the text, with a tokenizer that is there already."""
    from moe_llm.config import load_config
    from moe_llm.data.tokenizer import build_tokenizer

    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        config = load_config(QUICKSTART, [f"data.cache_dir={folder / 'quickstart'}", f"run.dir={folder / 'first'}"])
        build_tokenizer(config, tokenizer)
    path = folder / f"{cache}.yaml"
    sections = {
        "run": {"dir": str(folder / f"run-{cache}")},
        "model": {"vocab_size": 4096},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"sources": [{"type": "files", "path": str(text)}], "cache_dir": str(folder / cache)},
        "train": {"max_steps": 1},
    }
    path.write_text(json.dumps(sections), encoding="utf-8")
    return path


def start_prepare(config: Path) -> subprocess.Popen:
    command = [*MOE_LLM, "prepare", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def resident(session: int) -> int:
    """Bytes in memory of a process and its descendants, pages that they share counted once for each."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it has ended meanwhile
            continue
    return total


def time_prepare(config: Path) -> tuple[float, float, int]:
    """(seconds, seconds of all cores, peak bytes in memory) of the command."""
    begin, before, peak = time.perf_counter(), cpu_of_children(), 0
    process = start_prepare(config)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0, f"prepare ended with {process.returncode}"
    return time.perf_counter() - begin, cpu_of_children() - before, peak


def cpu_of_children() -> float:
    """Seconds that all cores have spent on processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_ENCODE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer, seconds, batch, size = Tokenizer.from_file(sys.argv[1]), 0.0, [], 0
def encode():
    global seconds
    begin = time.perf_counter()
    tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    seconds += time.perf_counter() - begin
for line in open(sys.argv[2], encoding="utf-8"):
    batch.append(json.loads(line)["text"])
    size += len(batch[-1])
    if size > 8e6:
        encode()
        batch, size = [], 0
encode()
print(seconds)
"""


def time_tokenizers(folder: Path, text: Path) -> tuple[float, float]:
    """(seconds, seconds of all cores) of encoding alone; the second with reading and the start of Python."""
    command = [sys.executable, "-c", _ENCODE, str(folder / "tokenizer/tokenizer.json"), str(text)]
    before = cpu_of_children()
    seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, cpu_of_children() - before


def measure_prepare(folder: Path, megabytes: float, rounds: int) -> dict:
    text = folder / "text.jsonl"
    write_text(text, megabytes)
    rows = []
    for turn in range(rounds):
        config = write_config(folder, text, f"cache-{turn}")
        alone, alone_cpu = time_tokenizers(folder, text)
        seconds, cpu, peak = time_prepare(config)
        row = {"prepare_s": seconds, "tokenizers_s": alone, "ratio": seconds / alone, "peak_mib": peak / 2**20}
        rows.append(row | {"prepare_cpu_s": cpu, "tokenizers_cpu_s": alone_cpu, "cpu_ratio": cpu / alone_cpu})
    return {
        "megabytes": megabytes,
        "cores": os.cpu_count(),
        "rounds": rows,
        "median_ratio": statistics.median(row["ratio"] for row in rows),
    }


def digest_of(cache: Path) -> str:
    """SHA-256 of the entry's files, by name."""
    found = hashlib.sha256()
    [entry] = [path for path in cache.glob("tokens-*") if path.is_dir()]
    for path in sorted(entry.rglob("*.bin")):
        found.update(str(path.relative_to(entry)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def measure_kills(folder: Path, megabytes: float, kills: int) -> dict:
    """A build that is killed at random moments, over and over, until it is done or has been killed often enough."""
    text = folder / "text.jsonl"
    write_text(text, megabytes)
    whole, *_ = time_prepare(write_config(folder, text, "whole"))
    expected, config, rng = digest_of(folder / "whole"), write_config(folder, text, "killed"), random.Random(0)
    done, same = 0, 0
    while done < kills:
        process = start_prepare(config)
        time.sleep(rng.uniform(0.2, 1.0) * whole)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            continue
        same += digest_of(folder / "killed") == expected
        config = write_config(folder, text, "killed")
        for path in sorted((folder / "killed").glob("*tokens-*")):
            subprocess.run(["rm", "-rf", str(path)], check=True)
    time_prepare(config)
    same_at_end = digest_of(folder / "killed") == expected
    return {
        "megabytes": megabytes,
        "kills": done,
        "builds_between": same,
        "byte_identical": same_at_end,
        "whole_s": whole,
    }


def measure_loader(folder: Path) -> dict:
    """Tokens a second of the loader in one thread, those that the quickstart trains on, and the seconds of a start."""
    from moe_llm.config import load_config
    from moe_llm.data.loader import TrainLoader, load_data
    from moe_llm.data.tokenizer import build_tokenizer

    config = load_config(QUICKSTART, [f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'run'}"])
    tokenizer = build_tokenizer(config, folder / "run/tokenizer")
    load_data(config, tokenizer, show_progress=False)
    begin = time.perf_counter()
    data = load_data(config, tokenizer, show_progress=False)
    sizes = {"global_batch_size": config.train.global_batch_size, "micro_batch_size": config.train.micro_batch_size}
    with TrainLoader(data.train, position=0, prefetch=0, **sizes) as loader:
        next(loader)
        start = time.perf_counter() - begin
        begin, steps = time.perf_counter(), 200
        for _ in range(steps):
            next(loader)
        fed = steps * config.tokens_per_step / (time.perf_counter() - begin)
    command = [*MOE_LLM, "train", str(QUICKSTART), "train.max_steps=20", "evaluate.every_steps=null"]
    command += [
        f"data.cache_dir={folder / 'cache'}",
        f"run.dir={folder / 'trained'}",
        "evaluate.max_blocks=8",
        "logging.every_steps=10",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = (folder / "trained/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    taken = json.loads(records[-1])["tokens_per_second"]
    return {"start_s": start, "loader_tokens_per_s": fed, "quickstart_tokens_per_s": taken, "times": fed / taken}


def measure_packing(folder: Path, steps: int, seeds: list[int]) -> dict:
    """Held-out loss and cut documents of both packings. The held-out text is packed as the training text is."""
    found: dict[str, dict] = {}
    for seed in seeds:
        for packing in ("concat", "best_fit"):
            run = folder / f"{packing}-{seed}"
            command = [*MOE_LLM, "train", str(QUICKSTART), f"data.packing={packing}"]
            command += [f"run.seed={seed}", f"run.dir={run}", f"data.cache_dir={folder / 'cache'}"]
            command += [f"train.max_steps={steps}", f"evaluate.every_steps={steps}", "evaluate.max_blocks=null"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            facts = json.loads((run / "facts.json").read_text(encoding="utf-8"))
            train = next(part for part in facts["data"] if part["split"] == "train")
            entry = found.setdefault(
                packing, {"cut_share": train["cut"] / train["documents"], "padding": train["padding"]}
            )
            entry.setdefault("val_loss", {})[seed] = last["val_loss"]
            entry.setdefault("val_bits_per_byte", {})[seed] = last["val_bits_per_byte"]
            print(packing, seed, last["val_loss"], last["val_bits_per_byte"], file=sys.stderr)
    return {"steps": steps, "packings": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "kills", "loader", "packing"))
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for what is built; a temporary one if it is not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.part == "prepare":
            found = measure_prepare(folder, arguments.megabytes, arguments.rounds)
        elif arguments.part == "kills":
            found = measure_kills(folder, arguments.megabytes, arguments.kills)
        elif arguments.part == "loader":
            found = measure_loader(folder)
        else:
            found = measure_packing(folder, arguments.steps, arguments.seeds)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
