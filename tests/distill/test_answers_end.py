"""Where a teacher's answers end: at each of its ends, or they are left out and counted."""

import json
import shutil

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_llm.data.chat_template import MIXTRAL, TEMPLATE_FILE
from moe_llm.distill.answers import AnswerOptions, write_answers

LONGEST = 6


def test_an_answer_ends_at_every_end_and_one_that_does_not_is_left_out_and_counted(dense, tmp_path):
    teacher = shutil.copytree(dense, tmp_path / "teacher")
    (teacher / TEMPLATE_FILE).write_text(MIXTRAL)
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    prompts = ["abc", "d e f", "gh", "abcd ghi", "pon", "mlk"]
    new = []
    for prompt in prompts:
        ids = tokenizer(f"<s> [INST] {prompt} [/INST]", return_tensors="pt", add_special_tokens=False)["input_ids"]
        for _ in range(LONGEST):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        new.append(ids[0, -LONGEST:].tolist())
    end = next(token for token in new[0][1:] if token != new[0][0])
    ends = {tokenizer.eos_token_id, end}
    cut = [next((i for i, token in enumerate(row) if token in ends), None) for row in new]
    texts = [None if i is None else tokenizer.decode(row[:i], skip_special_tokens=True) for row, i in zip(new, cut)]
    # a penalty of the folder would give other answers, and does not act
    generation = {"eos_token_id": sorted(ends), "repetition_penalty": 50.0}
    (teacher / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = AnswerOptions(max_new_tokens=LONGEST, beams=1, batch_size=1)
    written = write_answers(teacher, str(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl", options)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = {prompt: text.strip() for prompt, text in zip(prompts, texts) if text is not None and text.strip()}
    assert {row["prompt"]: row["completion"].strip() for row in rows} == expected
    assert expected
    assert (written.rows, written.left_out) == (len(expected), len(prompts) - len(expected))
