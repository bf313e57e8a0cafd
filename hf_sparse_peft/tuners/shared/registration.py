"""Telling peft about the tuners of this package. Importing `hf_sparse_peft` runs it, once per process."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
from collections.abc import Callable

import aenum
from packaging.version import Version

from ...utils.option_docs import document_options

MINIMUM_PEFT = "0.21.2"
TUNERS: dict[str, type] = {}
"""Model class of every tuner that was registered here, by `peft_type`."""


def check_peft() -> None:
    """Refuse a peft that lacks what the tuners are built on.

    Raises:
        ImportError: peft is older than `MINIMUM_PEFT`, or misses `register_peft_method` or `BufferDict`.
    """
    found = importlib.metadata.version("peft")
    if Version(found) < Version(MINIMUM_PEFT):
        raise ImportError(
            f"hf_sparse_peft needs peft>={MINIMUM_PEFT}, found {found}: pip install -U 'peft>={MINIMUM_PEFT}'"
        )
    try:
        from peft.tuners._buffer_dict import BufferDict  # noqa: F401
        from peft.utils import register_peft_method  # noqa: F401
        from peft.utils.quantization_utils import resolve_quantization_backend  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"hf_sparse_peft does not know peft {found}: {error}. Install the newest peft that it was tested with: "
            f"pip install 'peft=={MINIMUM_PEFT}'"
        ) from error


def add_peft_type(name: str) -> None:
    """Add `name` to `peft.PeftType`, a real enum member whose value is its name; does nothing the second time."""
    from peft import PeftType

    if name not in PeftType.__members__:
        aenum.extend_enum(PeftType, name, name)


def register_tuner(config_cls: type, model_cls: type) -> None:
    """Register one tuner with peft under its config's name, `config_cls.tuner`, with prefix `tuner + "_"`, and let peft
    count its parameters and add its heads; does nothing the second time.

    Raises:
        ValueError: the config has no name.
    """
    import peft.tuners.mixed.model
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    name = config_cls.tuner
    if not name or name != name.lower():
        raise ValueError(f'{config_cls.__name__}.tuner={name!r}: set a lower-case name, such as "sparse_lora".')
    add_peft_type(name.upper())
    document_options(config_cls)
    count_living_parameters()
    train_task_heads()
    TUNERS[name.upper()] = model_cls
    if name.upper() not in {member.value for member in PEFT_TYPE_TO_CONFIG_MAPPING}:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=True)
    compatible = peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES
    if PeftType[name.upper()] not in compatible:
        compatible = (*compatible, PeftType[name.upper()])
        peft.tuners.mixed.COMPATIBLE_TUNER_TYPES = peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES = compatible


def count_living_parameters() -> None:
    """Let `PeftModel.print_trainable_parameters()` leave out units and components that are allocated but dead, and
    not count frozen ones as trainable.

    Shapes never change while supports and ranks move, so counting `numel()` would overstate what trains. Models whose
    tuner has no `dead_parameters` are counted as before.
    """
    from peft import PeftMixedModel, PeftModel

    for model_cls in (PeftModel, PeftMixedModel):
        if not getattr(model_cls.get_nb_trainable_parameters, "_counts_living", False):
            model_cls.get_nb_trainable_parameters = _counting_living(model_cls.get_nb_trainable_parameters)


def _counting_living(original: Callable) -> Callable:

    @functools.wraps(original)
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        trainable, everything = original(self)
        # get_model_status calls it on plain modules too, whose layers were injected.
        base = getattr(self, "base_model", None)
        dead_parameters = getattr(type(base), "dead_parameters", None)
        dead = dead_parameters(base) if dead_parameters is not None else 0
        frozen_parameters = getattr(type(base), "frozen_parameters", None)
        frozen = frozen_parameters(base) if frozen_parameters is not None else 0
        return trainable - dead - frozen, everything - dead

    get_nb_trainable_parameters._counts_living = True
    return get_nb_trainable_parameters


def train_task_heads() -> None:
    """Let peft's models for token classification and question answering add their heads to our configs in time.

    peft's constructors add `modules_to_save` to the config that they were given after the tuner was made of it. Our
    tuners keep a copy of that config, so that one object serves several models; the copy would name no head, and none
    would be saved. Does nothing the second time.
    """
    from peft import PeftModelForQuestionAnswering, PeftModelForTokenClassification

    _add_heads_first(PeftModelForTokenClassification, ["classifier", "score"])
    _add_heads_first(PeftModelForQuestionAnswering, ["qa_outputs"])


def _add_heads_first(model_cls: type, heads: list[str]) -> None:
    from .config import AdapterConfig

    original = model_cls.__init__
    if getattr(original, "_adds_heads_first", False):
        return

    @functools.wraps(original)
    def __init__(self, model, peft_config=None, adapter_name="default", **kwargs) -> None:
        if isinstance(peft_config, AdapterConfig):
            peft_config = copy.copy(peft_config)
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or []), *heads]))
        original(self, model, peft_config, adapter_name, **kwargs)

    __init__._adds_heads_first = True
    model_cls.__init__ = __init__
