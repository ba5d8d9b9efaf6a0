"""A checkpoint or an adapter to a model hub: weights, tokenizer, card and code, and nothing of the training."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.checkpoint.manifest import write_file, write_json
from moe_llm.checkpoint.safetensors_io import read_json
from moe_llm.errors import UserError
from moe_llm.families.card import CARD, adapter_card, hub_name

# the optimizer, whatever holds paths of this machine (the run's configuration, a merge's recipe and matching), and the
# average, which is a checkpoint of its own
LEFT_OUT = ("trainer/*", "ema/*", "merge_recipe.yaml", "expert_matching.json", ".tmp-*", "*.tmp")

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT has them


def check_hub(repository: str, where: str) -> None:
    """Refuse a name that no repository has, and a hub without a login, before any work.

    Args:
        where: what names the repository, for the error.

    Raises:
        UserError: it says what to do.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{where}={repository} is no name of a repository: write it as OWNER/NAME") from error
    if get_token() is None:
        raise UserError(f"{where}={repository} needs a login: run `hf auth login`, or set HF_TOKEN")


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    private: bool = False,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Upload a checkpoint or an adapter, in one commit, and give the address of the repository, which is made where there
    is none.

    Args:
        base: of an adapter, the repository of the model that it belongs to; None: as its adapter_config.json names it.

    Raises:
        UserError: no checkpoint there, an adapter of a base that no hub knows, no login, or the hub refuses.
    """
    directory = Path(checkpoint).resolve()
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").exists():
        with tempfile.TemporaryDirectory() as copied:
            _copy_adapter(directory, Path(copied), base)
            return _upload(Path(copied), directory.name, repository, private)
    if base is not None:
        raise UserError(f"--base={base} is for adapters, and {checkpoint} is none: leave it out")
    check_checkpoint_directory(checkpoint)
    if not (directory / CARD).is_file():
        say(
            f"{checkpoint} has no {CARD}: it was written before checkpoints had model cards, and the hub will show none"
        )
    return _upload(directory, directory.name, repository, private)


def _copy_adapter(directory: Path, copied: Path, base: str | None) -> None:
    """Its files as a hub should have them: the base by its name there, and a card."""
    content = read_json(directory / ADAPTER_CONFIG)
    named = base or hub_name(content.get("base_model_name_or_path"))
    if base is not None:
        check_hub(base, "--base")
    if named is None:
        raise UserError(
            f"{directory} adapts {content.get('base_model_name_or_path')}, which is no repository: name that of its base by "
            "--base OWNER/NAME"
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{directory} has no {ADAPTER_WEIGHTS}: export the adapter again")
    shutil.copyfile(directory / ADAPTER_WEIGHTS, copied / ADAPTER_WEIGHTS)
    write_json(copied / ADAPTER_CONFIG, content | {"base_model_name_or_path": named})
    write_file(copied / CARD, adapter_card(content, named))


def _upload(directory: Path, name: str, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_hub(repository, "REPO")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=directory,
            repo_id=repository,
            ignore_patterns=list(LEFT_OUT),
            commit_message=f"Upload {name}",
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{repository} cannot be written ({reason}): look at the network, the name and the rights of the token"
        ) from error
    return str(address)
