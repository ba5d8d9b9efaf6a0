"""A checkpoint to a model hub: weights, tokenizer, card and code, and nothing of the training."""

from collections.abc import Callable
from pathlib import Path

from moe_llm.checkpoint.folder import check_checkpoint_directory
from moe_llm.errors import UserError
from moe_llm.families.card import CARD

# the optimizer, whatever holds paths of this machine (the run's configuration, a merge's recipe and matching), and the
# average, which is a checkpoint of its own
LEFT_OUT = ("trainer/*", "ema/*", "merge_recipe.yaml", "expert_matching.json", ".tmp-*", "*.tmp")


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


def push(checkpoint: str | Path, repository: str, *, private: bool = False, say: Callable[[str], None] = print) -> str:
    """Upload a checkpoint, in one commit, and give the address of the repository, which is made where there is none.

    Raises:
        UserError: no checkpoint there, no login, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_checkpoint_directory(checkpoint)
    check_hub(repository, "REPO")
    directory = Path(checkpoint).resolve()
    if not (directory / CARD).is_file():
        say(
            f"{checkpoint} has no {CARD}: it was written before checkpoints had model cards, and the hub will show none"
        )
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=directory,
            repo_id=repository,
            ignore_patterns=list(LEFT_OUT),
            commit_message=f"Upload {directory.name}",
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{repository} cannot be written ({reason}): look at the network, the name and the rights of the token"
        ) from error
    return str(address)
