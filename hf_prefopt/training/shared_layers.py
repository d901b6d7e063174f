"""Run the layers below the first trained layer only once for the policy and the reference, where this is possible."""

from accelerate import Accelerator

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.engine import any_rank
from hf_prefopt.reference.live import LiveReference
from hf_prefopt.scoring.layout import made_up_batch
from hf_prefopt.scoring.modes import ModuleTree
from hf_prefopt.training.wrapping import is_compiled, is_sharded


def share_lower_layers(
    reference: LiveReference | CachedReference | None,
    tree: ModuleTree,
    layout: str,
    args: PreferenceConfig,
    accelerator: Accelerator,
    has_aux_loss: bool,
) -> list[str]:
    """Let the policy reuse the reference's outputs of the layers below the first trained layer, if this is exact.

    The layers are shared on all ranks or on none. They are not shared if the reference is a cache of log-probs, or a
    separate model whose weights the engine shards.

    Args:
        tree: Modules of the policy.
        layout: Name of the batch layout.
        has_aux_loss: Whether the auxiliary router loss is added.

    Returns:
        Notes for the start summary: which layers are shared, or the reason why none is.
    """
    if not isinstance(reference, LiveReference) or (reference.is_separate and is_sharded(accelerator)):
        return []
    known = None
    if has_aux_loss:
        known = "the routers' auxiliary loss reads all layers"
    elif is_compiled(accelerator):
        known = "the model is compiled"
    elif args.neftune_noise_alpha is not None:
        known = "NEFTune adds noise to the policy's embeddings, but not to the reference's"
    with accelerator.autocast():
        said = reference.share_lower_layers(tree, made_up_batch(layout, tree.model), known)
    if any_rank(accelerator, reference.lower is None):
        reference.lower = None
    return [said] if said else []
