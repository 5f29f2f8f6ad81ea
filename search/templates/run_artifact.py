"""Runs this exported model: needs numpy, safetensors and the runtime that its card names, and nothing of paretune.

    python run.py            checks that it answers the recorded probe as it did when it was measured; --exactly
                             allows no difference, as on the machine that measured it
    python run.py data.npz   prints the outputs for the arrays of a file, one array for each input

or `from run import Model; outputs = Model()(inputs)` with a dictionary of arrays, batch first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.02
"""Other processors may round otherwise: largest difference that passes, as a share of the largest output."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


def openvino_model(path: Path, card: dict[str, Any]) -> Callable[[Arrays], Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    batch = card["target"]["batch_size"]
    model.reshape({port.any_name: [batch, *list(port.partial_shape)[1:]] for port in model.inputs})
    compiled = core.compile_model(model, "CPU", card["settings"])
    return lambda inputs: np.array(compiled(inputs)[0])


def onnxruntime_model(path: Path, card: dict[str, Any]) -> Callable[[Arrays], Any]:
    import onnxruntime

    settings, options = card["settings"], onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["intra_op_num_threads"]
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("batch", card["target"]["batch_size"])
    session = onnxruntime.InferenceSession(
        str(path),
        options,
        providers=[
            (settings["provider"], {key: settings[key] for key in ("device_id", "use_tf32") if key in settings})
        ],
        # These would run layers in other widths than they were trained for.
        disabled_optimizers=settings["disabled_optimizers"].split(","),
    )
    return lambda inputs: session.run(None, inputs)[0]


RUNTIMES = {"openvino": openvino_model, "onnxruntime": onnxruntime_model}


class Model:
    """The compiled model: maps a dictionary of input arrays, batch first, to the output array."""

    def __init__(self, folder: Path = HERE) -> None:
        card = json.loads((folder / "card.json").read_text())
        self.batch_size = card["target"]["batch_size"]
        self._run = RUNTIMES[card["target"]["runtime"]](folder / card["model"], card)

    def __call__(self, inputs: Arrays) -> Any:
        count = len(next(iter(inputs.values())))
        outputs = []
        for start in range(0, count, self.batch_size):
            part = {name: array[start : start + self.batch_size] for name, array in inputs.items()}
            length = len(next(iter(part.values())))
            full = {name: np.resize(array, (self.batch_size, *array.shape[1:])) for name, array in part.items()}
            outputs.append(self._run(full)[:length])
        return np.concatenate(outputs)


def check(*, exactly: bool) -> bool:
    """Compare with the recorded probe, and say what came of it."""
    inputs = load_file(HERE / "probe.safetensors")
    expected = inputs.pop("output")
    difference = float(np.abs(Model()(inputs) - expected).max())
    if difference == 0:
        print(f"ok: {len(expected)} recorded outputs, equal bit for bit")
        return True
    good = not exactly and difference <= TOLERANCE * float(np.abs(expected).max())
    print(f"{'ok' if good else 'WRONG'}: the outputs differ by up to {difference:.3g} from the recorded ones")
    return good


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--exactly"]):
        sys.exit(0 if check(exactly=len(sys.argv) > 1) else 1)
    print(Model()(dict(np.load(sys.argv[1], allow_pickle=False))))
