"""Which requests can be verified: what `commit="verify"` asks of a model and goes together with."""

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams

__all__ = ["check_verifiable"]


def check_verifiable(
    params: GenerationParams, *, shift_logits: bool, prompt_attention: str, commit_attention: str
) -> None:
    """Refuse what cannot be verified.

    Args:
        params: of the request, whose `commit` is "verify".
        shift_logits: of the model, see `ModelFacts`, as for the next two.
        prompt_attention: "causal" can be verified.
        commit_attention: "causal" can, too.

    Raises:
        InvalidParams: prompt and committed rows of the model do not predict the next token from
            what is before it alone, or another parameter stands against it.
    """
    is_causal = prompt_attention == "causal" and (
        commit_attention == "causal" or params.block_size == 1
    )
    if not (shift_logits and is_causal):
        allowed = "'filled' for a model whose committed blocks predict no next token"
        raise InvalidParams("commit", params.commit, allowed)
    for name, value, needed in (
        ("sub_block_size", params.sub_block_size, 0),
        ("stop_at_eos", params.stop_at_eos, "truncate"),
        ("attention", params.attention, "blocks"),
        ("edit_threshold", params.edit_threshold, None),
    ):
        if value != needed:
            raise InvalidParams(name, value, f"{needed!r} when commit is 'verify'")
