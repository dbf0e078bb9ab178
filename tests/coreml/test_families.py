"""Packages of every family, in every form, against transformers' own logits."""

import contextlib
import io
import logging
import warnings

import families
import numpy as np
import pytest

from loraduct.converters import coreml
from loraduct.errors import Refused
from loraduct.formats import base as base_folder
from loraduct.formats.coreml import package, program

TOLERANCE = 2e-3  # of the logits' scale, FLOAT16 throughout
FORMS = {
    "stateful": {},
    "stateless": {"stateless": True},
    "iOS17": {"stateless": True, "target": "iOS17"},
    "fixed shapes": {"shapes": (1, 8)},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (model, base, tokens, its logits), each made once."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = families.saved(name, tmp_path_factory.mktemp("base"))
            ids = families.tokens(30)
            made[name] = (base_folder.read(folder), ids, families.reference(model, ids))
        return made[name]

    return get


def build(base, path, **options):
    coreml.build(base, path, coreml.Options(context=families.CONTEXT, **options))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_transformers(models, tmp_path, name, form):
    base, ids, wanted = models(name)
    path = build(base, tmp_path / "x.mlpackage", **FORMS[form])
    assert families.off(families.run(path, ids), wanted) <= TOLERANCE
    # without rounding of intermediates only that of weights and rotations is left
    assert families.off(families.run(path, ids, "fp32"), wanted) <= 5e-4
    strict = families.run(path, ids, "fp16-strict")
    assert np.isfinite(strict).all()
    assert families.off(strict, wanted) <= 2 * TOLERANCE


@pytest.fixture(scope="module")
def ct():
    """coreml tools, without what it says while it is imported."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        import coremltools

        logging.disable(logging.NOTSET)
    return coremltools


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_coremltools_accepts_them_and_infers_the_same_types(models, tmp_path, ct, name, form):
    """milproto.load makes every operation anew and infers its type from its inputs' types."""
    from coremltools.converters.mil.frontend.milproto.load import load

    base, _, _ = models(name)
    path = build(base, tmp_path / "x.mlpackage", **FORMS[form])
    spec = ct.proto.Model_pb2.Model()
    spec.ParseFromString((path / "Data" / package.SPEC).read_bytes())
    weights = str(path / "Data" / package.WEIGHTS)
    theirs = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    ours = package.read(path)
    assert set(theirs.functions) == set(ours.functions)
    for function, made in theirs.functions.items():
        types = {
            o.name: program.type_of(o.type)[1]
            for op in program.block_of_function(ours.functions[function]).operations
            for o in op.outputs
        }
        for op in made.operations:
            for out in op.outputs:
                if out.name in types:
                    sizes = [None if not isinstance(s, int | np.integer) else s for s in out.shape]
                    declared = types[out.name]
                    assert len(sizes) == len(declared), out.name
                    pairs = zip(sizes, declared, strict=True)
                    assert all(a == b for a, b in pairs if a is not None and b is not None), (
                        out.name
                    )
        multi = {"function_name": function} if spec.description.functions else {}
        ct.models.MLModel(str(path), skip_model_load=True, **multi)


def test_same_input_same_bytes(models, tmp_path):
    base, _, _ = models("llama")
    one, two = (build(base, tmp_path / f"{n}.mlpackage") for n in "ab")
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_a_tied_embedding_is_stored_once(models, tmp_path):
    base, _, _ = models("smollm3")
    path = build(base, tmp_path / "x.mlpackage")
    weights = sum(np.prod(t.shape) * 2 for t in base.tensors.values())
    tables = 2 * families.CONTEXT * 8 * 2
    blobs = len(base.tensors) + 2
    assert (path / "Data" / package.WEIGHTS / "weight.bin").stat().st_size <= (
        weights + tables + 64 + blobs * 128
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 65}, "--context 65: the model has 64 positions"),
        ({"target": "iOS17"}, "iOS17 has no states: add --stateless"),
        ({"target": "iOS17", "stateless": True, "shapes": (1, 2)}, "holds one function"),
        ({"shapes": (100,)}, "--shapes 100: expected 1 to 64"),
    ],
)
def test_what_can_not_be_built_is_refused(models, tmp_path, options, says):
    base, _, _ = models("llama")
    with pytest.raises(Refused, match=says):
        coreml.build(base, tmp_path / "x.mlpackage", coreml.Options(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "bert"}, "model_type 'bert' can't be built; known: llama"),
        ({"hidden_act": "relu6"}, "activation 'relu6' is not known"),
        ({"num_key_value_heads": 4}, "6 heads are no multiple of 4"),
        ({"hidden_size": "many"}, "hidden_size is 'many', expected a positive integer"),
        ({"num_hidden_layers": 9}, "has no weight model.layers.3"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'"),
    ],
)
def test_a_base_that_is_none_of_them_is_refused(models, tmp_path, change, says):
    base, _, _ = models("llama")
    other = base_folder.Base(base.path, {**base.config, **change})
    with pytest.raises(Refused, match=says):
        coreml.build(other, tmp_path / "x.mlpackage", coreml.Options())
    assert not list(tmp_path.iterdir())
