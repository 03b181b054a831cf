"""Which requests can be verified: what `commit="verify"` asks of a model and goes together with."""

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams

__all__ = ["check_verifiable"]


def check_verifiable(params: GenerationParams, *, is_autoregressive: bool) -> None:
    """Refuse what cannot be verified.

    Args:
        params: of the request, whose `commit` is "verify".
        is_autoregressive: whether prompt and committed rows of the model predict the next token
            from what is before it alone.

    Raises:
        InvalidParams: the model cannot, or another parameter stands against it.
    """
    if not is_autoregressive:
        allowed = "'filled' for a model whose committed blocks predict no next token"
        raise InvalidParams("commit", params.commit, allowed)
    if params.sub_block_size:
        raise InvalidParams("sub_block_size", params.sub_block_size, "0 when commit is 'verify'")
    if params.stop_at_eos != "truncate":
        allowed = "'truncate' when commit is 'verify'"
        raise InvalidParams("stop_at_eos", params.stop_at_eos, allowed)
