"""How a source's text is changed while it is trained on: the `augment` section of a source."""

from typing import Literal

from pydantic import Field, model_validator

from moe_llm.config.base import Section, invalid


class AugmentConfig(Section):
    """Changes of training text, drawn anew for each sample by `run.seed` and the sample's number: a run resumes with the
    same ones, at any number of ranks. Held-out text stays as it is."""

    kind: Literal["mask", "span", "edits"] | None = Field(
        None,
        description="mask: tokens of the input are replaced by mask_token, targets stay; span: spans are cut out and have to "
        "be written behind the text, in order (Raffel et al. 2020; as text to continue, Tay et al. 2022); edits: an edited "
        "text, and the text (Diffuser, Reid et al. 2022); null: text is read as it is",
    )
    rate: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="share of the tokens that are masked, cut out or edited; edits: the most, drawn for each document",
    )
    share: float = Field(1.0, gt=0, le=1, description="of the documents, those that are changed")
    span_length: float = Field(3.0, ge=1, description="span: mean length, in tokens")
    mask_token: str | None = Field(
        None, min_length=1, description="mask, span: a token; null: the tokenizer's mask token, else its unknown one"
    )
    separator: str = Field("\n=>\n", min_length=1, description="span, edits: text before what is to be restored")

    @model_validator(mode="after")
    def _settings_apply(self):
        every = ("mask", "span", "edits")
        kinds = {"rate": every, "share": every, "span_length": ("span",)}
        kinds |= {"mask_token": ("mask", "span"), "separator": ("span", "edits")}
        for name, applies in kinds.items():
            value = getattr(self, name)
            if self.kind not in applies and value != type(self).model_fields[name].default:
                invalid(
                    name, value, f"applies to kind {' and '.join(applies)}, not to {self.kind or 'none'}", "remove it"
                )
        return self
