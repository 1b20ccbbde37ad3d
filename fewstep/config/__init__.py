"""Recipes as checked data: registered parts, YAML with line numbers, and all problems of a file at once."""

from fewstep.config.check import validate as validate
from fewstep.config.parts import (
    REGISTRY as REGISTRY,
    Absent as Absent,
    Bounded as Bounded,
    Count as Count,
    Decay as Decay,
    NotNegative as NotNegative,
    OneOf as OneOf,
    Positive as Positive,
    Proper as Proper,
    RecipeError as RecipeError,
    UserError as UserError,
    _close as _close,
    config as config,
    part as part,
    plain as plain,
    stated as stated,
)
from fewstep.config.source import (
    FAST_LOADER as FAST_LOADER,
    PLAIN_LOADER as PLAIN_LOADER,
    Source as Source,
    apply as apply,
    load_yaml as load_yaml,
    merge as merge,
    override as override,
    parse as parse,
    path_of as path_of,
)
