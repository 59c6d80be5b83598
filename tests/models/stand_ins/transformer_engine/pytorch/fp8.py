from contextlib import contextmanager


class FP8GlobalStateManager:
    """Knows in which recipe's context the caller is; None outside of all."""

    recipe = None

    @classmethod
    def is_fp8_enabled(cls):
        return cls.recipe is not None


@contextmanager
def fp8_autocast(enabled, fp8_recipe, fp8_group):
    outer, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, fp8_recipe if enabled else None
    yield
    FP8GlobalStateManager.recipe = outer


def fp8_model_init(**_):
    raise NotImplementedError
