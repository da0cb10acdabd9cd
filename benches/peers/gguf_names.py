"""diffusers' reader of FLUX.1 files in BFL's names has the width of the published model written into it."""

import inspect

from diffusers.loaders import single_file_model, single_file_utils

NAME = "convert_flux_transformer_checkpoint_to_diffusers"
WIDTH = "inner_dim = 3072"


def any_width():
    """Takes the width from the file instead, so that the tiny model can be read. For 3072 nothing changes."""
    source = inspect.getsource(getattr(single_file_utils, NAME))
    if WIDTH not in source:
        raise RuntimeError("diffusers' reader has changed; see whether it reads any width by now")
    source = source.replace(WIDTH, 'inner_dim = checkpoint["img_in.weight"].shape[0]')
    scope = dict(vars(single_file_utils))
    exec(source, scope)
    single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]["checkpoint_mapping_fn"] = scope[NAME]
