"""The job: what the user wrote, as frozen records. Reading one imports neither torch nor Optuna."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from paretune.search.job_errors import Problem, as_job_error
from paretune.search.job_types import (
    ANY_OR_STRING,
    RANGE_SCHEMA,
    BitList,
    Constraint,
    ObjectiveName,
    as_bits,
    as_range,
    as_text,
    auto_or_bool,
    folder_of,
    in_bounds,
    live_or_import,
    plain,
    resolve_path,
    string_or_object,
    unique,
)
from paretune.search.job_yaml import parse_yaml, read_yaml, write_yaml
from paretune.spaces.plan import Importance
