"""The packer against MLX's own kernels: every mode's bits, its error, and that its bytes depend on the values alone."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest

from ltx2.quant.codes import affine
from ltx2.quant.codes import pack as packing
from ltx2.quant.codes.arithmetic import Arithmetic
from ltx2.quant.codes.inputs import Inputs
from ltx2.quant.codes.minifloat import output_multiplier
from ltx2.quant.codes.on_cpu import OnCpu
from ltx2.quant.codes.on_gpu import OnGpu
from ltx2.quant.codes.pack import Packed, pack, unpack
from ltx2.runtime.files.tensors import bf16_to_f32, f32_to_bf16
from ltx2.runtime.model.forms import MODES, Form
from tests.support.layers import KINDS, Layer, layer
from tests.support.parity import relative_l2

Figure = Callable[..., None]
FORMS = [Form(b, g, name) for name, mode in MODES.items() for b in mode.bits for g in mode.group_sizes]
FOUR_AND_EIGHT = [Form(4, 64, "affine"), Form(8, 64, "affine"), Form(4, 32, "mxfp4"), Form(8, 32, "mxfp8"),
                  Form(4, 16, "nvfp4")]  # fmt: skip
DTYPES = ("BF16", "F16", "F32")
UNKNOWN = ((7, 64, "affine"), (4, 16, "affine"), (8, 32, "mxfp4"), (4, 32, "nvfp4"), (4, 64, "q4"))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def every(forms: Sequence[Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms, ids=str)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as a checkpoint stores them."""
    return f32_to_bf16(values) if dtype == "BF16" else values.astype(np.float16 if dtype == "F16" else np.float32)


def as_float32(values: np.ndarray) -> np.ndarray:
    return bf16_to_f32(values) if values.dtype == np.uint16 else values.astype(np.float32)


def weights(kind: str, rows: int = 32, width: int = 1024) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = {
        "gauss": lambda: rng.standard_normal((rows, width)),
        "uniform": lambda: rng.uniform(-1, 1, (rows, width)),
        "heavy": lambda: rng.standard_t(4, (rows, width)) * np.exp(0.4 * rng.standard_normal((1, width))),
        "shifted": lambda: rng.standard_normal((rows, width)) + 1.5,
        "negative": lambda: -3 - np.abs(rng.standard_normal((rows, width))),
    }[kind]()
    return (0.02 * x).astype(np.float32)


def some_inputs(width: int) -> Inputs:
    """Statistics of inputs whose channels differ."""
    rng = np.random.default_rng(1)
    mean = rng.standard_normal(width).astype(np.float32)
    return Inputs(np.square(mean) + rng.uniform(0, 9, width).astype(np.float32), mean)


def multiplier_of(form: Form, values: np.ndarray) -> float:
    return output_multiplier(float(np.abs(values).max())) if form.multiplied else 1.0


def by_mlx(values: np.ndarray, form: Form) -> np.ndarray:
    """What is left of bfloat16 codes after mx.quantize."""
    sizes = (form.group_size, form.bits, form.mode)
    codes, scales, *biases = mx.quantize(mx.array(values).view(mx.bfloat16), *sizes)
    if biases:
        return np.array(mx.dequantize(codes, scales.astype(mx.float32), biases[0].astype(mx.float32), *sizes))
    return np.array(mx.dequantize(codes, scales, None, *sizes, dtype=mx.float32))


def meant(packed: Packed, form: Form, multiplier: float) -> np.ndarray:
    """What the stored bits mean, read by the definition of each format."""
    bits = np.unpackbits(packed.codes.view(np.uint8), axis=1, bitorder="little")
    codes = bits.reshape(len(packed.codes), -1, form.bits) @ (1 << np.arange(form.bits))
    groups = codes.reshape(*packed.scales.shape, form.group_size)
    if packed.biases is not None:
        scales, biases = (as_float32(a)[..., None] for a in (packed.scales, packed.biases))
        return (groups.astype(np.float32) * scales + biases).reshape(codes.shape)
    values = e4m3(groups) if form.bits == 8 else np.where(groups & 8, -1, 1) * E2M1[groups & 7]
    scales = e4m3(packed.scales) if form.multiplied else np.exp2(packed.scales.astype(np.float32) - 127)
    return (values * scales[..., None] * multiplier).astype(np.float32).reshape(codes.shape)


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, mantissa = codes.astype(int) >> 3 & 15, codes.astype(int) & 7
    assert not ((exponent == 15) & (mantissa == 7)).any()  # NaN
    sizes = np.where(exponent, (8 + mantissa) * np.exp2(exponent - 10.0), mantissa * np.exp2(-9.0))
    return np.where(codes.astype(int) & 128, -sizes, sizes).astype(np.float32)


class TestBits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @every(FORMS)
    def test_mlx_reads_what_is_meant(self, form: Form, dtype: str) -> None:
        values = stored(weights("shifted", 7, 384), dtype)
        multiplier = multiplier_of(form, as_float32(values))
        packed, loss = pack(values, form, None, multiplier)
        assert packed.codes.shape == (7, 384 * form.bits // 32) and packed.codes.dtype == np.uint32
        assert packed.scales.shape == (7, 384 // form.group_size)
        assert packed.scales.dtype == (values.dtype if form.biased else np.uint8)
        assert (packed.biases is not None) == form.biased
        restored = unpack(packed, form, multiplier)
        np.testing.assert_array_equal(restored, meant(packed, form, multiplier))
        assert relative_l2(restored, as_float32(values)) == pytest.approx(loss.relative, rel=1e-4)

    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    def test_every_code_is_where_mlx_expects_it(self, bits: int) -> None:
        codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 128))
        words = mx.array(OnCpu().words(codes.reshape(-1, 32).T.astype(np.uint32), bits).reshape(3, -1))
        ones, zeros = mx.ones((3, 4)), mx.zeros((3, 4))
        np.testing.assert_array_equal(np.array(mx.dequantize(words, ones, zeros, 32, bits)), codes)

    @every([form for form in FOUR_AND_EIGHT if not form.biased])
    def test_values_that_can_be_stored_are(self, form: Form) -> None:
        """What was unpacked packs without loss."""
        multiplier = 2.0**-7 if form.multiplied else 1.0
        values = unpack(pack(stored(weights("heavy"), "BF16"), form, None, multiplier)[0], form, multiplier)
        assert pack(values, form, None, multiplier)[1].error == 0

    def test_forms_that_mlx_does_not_know(self) -> None:
        for bits, group, mode in UNKNOWN:
            with pytest.raises(ValueError, match=mode):
                Form(bits, group, mode)


class TestError:
    @pytest.mark.parametrize("kind", ["gauss", "heavy", "uniform", "shifted", "negative"])
    @every(FORMS)
    def test_not_above_mlx(self, form: Form, kind: str) -> None:
        values = f32_to_bf16(weights(kind, rows=16))
        exact = bf16_to_f32(values)
        _, loss = pack(values, form, None, multiplier_of(form, exact))
        assert loss.relative <= relative_l2(by_mlx(values, form), exact) * (1 + 1e-6)

    @pytest.mark.parametrize(("name", "inputs"), KINDS)
    def test_output_error_over_mlx(self, figure: Figure, name: str, inputs: str) -> None:
        """The table: without statistics, with E[x^2], and with a corrected bias too, which leaves the variances."""
        data = layer(name, inputs, rows=128)
        values = f32_to_bf16(data.weights)
        for form, limits in LIMITS.items():
            theirs = output_error(data, by_mlx(values, form))
            reached = [error / theirs for error in our_errors(data, values, form)]
            kinds = ("", ", weighted", ", weighted, bias corrected")
            for kind, ratio, limit in zip(kinds, reached, limits, strict=True):
                where = f"{form.mode} {form.bits} bits, {name}/{inputs}{kind}"
                figure(f"output error / mx.quantize's ({100 * theirs:.2f} %): {where}", ratio, limit=limit)


LIMITS = {
    Form(3, 64, "affine"): (0.9, 0.7, 0.66),
    Form(4, 64, "affine"): (0.92, 0.76, 0.7),
    Form(8, 64, "affine"): (0.78, 0.64, 0.61),
    Form(4, 32, "mxfp4"): (0.96, 0.93, 0.89),
    Form(8, 32, "mxfp8"): (1.001, 1.001, 0.97),
    Form(4, 16, "nvfp4"): (0.92, 0.79, 0.68),
}


def our_errors(data: Layer, values: np.ndarray, form: Form) -> list[float]:
    x = data.calibration
    multiplier = multiplier_of(form, data.weights)
    mean_square, mean = np.square(x).mean(0), x.mean(0)
    known = (None, Inputs(mean_square), Inputs(mean_square, mean))
    plain, weighted, centred = (pack(values, form, inputs, multiplier)[0] for inputs in known)
    return [
        output_error(data, unpack(plain, form, multiplier)),
        output_error(data, unpack(weighted, form, multiplier)),
        output_error(data, unpack(centred, form, multiplier), centred.drift),
    ]


def output_error(data: Layer, restored: np.ndarray, bias: np.ndarray | None = None) -> float:
    exact = bf16_to_f32(f32_to_bf16(data.weights))
    return relative_l2(data.inputs @ restored.T + (0 if bias is None else bias), data.inputs @ exact.T)


class TestSameBytes:
    @pytest.mark.parametrize("known", [False, True])
    @every(FOUR_AND_EIGHT)
    def test_chunks_blocks_and_threads_change_nothing(
        self, monkeypatch: pytest.MonkeyPatch, form: Form, known: bool
    ) -> None:
        values = f32_to_bf16(weights("heavy", 13, 128))
        counts = some_inputs(128) if known else None
        multiplier = multiplier_of(form, bf16_to_f32(values))
        whole, loss = pack(values, form, counts, multiplier)
        for block in (1, 300, 1 << 20):
            monkeypatch.setattr(packing, "CPU_BLOCK", block)
            for rows in (1, 5, 13):
                parts = [pack(values[i : i + rows], form, counts, multiplier) for i in range(0, 13, rows)]
                for ours, *theirs in zip(whole, *(part for part, _ in parts), strict=True):
                    assert (ours is None) == (theirs[0] is None)
                    if ours is not None:
                        np.testing.assert_array_equal(np.concatenate(theirs), ours)
                assert sum(part.error for _, part in parts) == pytest.approx(loss.error, rel=1e-6)

    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @every(FORMS)
    def test_numpy_and_mlx_agree(self, monkeypatch: pytest.MonkeyPatch, form: Form, dtype: str, known: bool) -> None:
        """Both implementations of the arithmetic, the second on whatever device MLX uses here."""
        counts = some_inputs(256) if known else None
        for kind in ("gauss", "heavy", "shifted"):
            values = stored(weights(kind, 8, 256), dtype)
            multiplier = multiplier_of(form, as_float32(values))
            ours, loss = pack(values, form, counts, multiplier)
            monkeypatch.setattr(packing, "is_gpu", lambda: True)
            theirs, other = pack(values, form, counts, multiplier)
            monkeypatch.setattr(packing, "GPU_BLOCK", 3 * 256)  # each begun before the one before it is waited for
            in_blocks, _ = pack(values, form, counts, multiplier)
            monkeypatch.undo()
            for a, b in zip(ours, in_blocks, strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)  # None is None
            assert (loss.error, loss.norm) == (other.error, other.norm)

    @pytest.mark.parametrize("count", [16, 32, 64, 128])
    @pytest.mark.parametrize("groups", [1, 2, 50])
    @pytest.mark.parametrize("on", [OnCpu(), OnGpu()])
    def test_sums_add_one_after_the_other(self, on: Arithmetic, count: int, groups: int) -> None:
        values = np.random.default_rng(0).standard_normal((count, groups)).astype(np.float32)
        total = np.zeros(groups, np.float32)
        for row in values:
            total += row
        np.testing.assert_array_equal(on.numpy(on.group_sums(on.xp.array(values))), total)

    def test_a_multiplier_is_exact(self) -> None:
        """Weights 2**k times as large give the same codes with a multiplier 2**k times as large."""
        values, form = weights("heavy"), Form(4, 16, "nvfp4")
        ours, _ = pack(values, form, None, 2.0**-7)
        theirs, _ = pack(values * 2.0**12, form, None, 2.0**5)
        assert (ours.codes == theirs.codes).all() and (ours.scales == theirs.scales).all()


class TestValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    @every([s for s in FORMS if s.biased and s.group_size == 32])
    def test_constant_groups_are_exact(self, form: Form, dtype: str) -> None:
        values = np.zeros((4, 64), np.float32)
        values[1:3] = [[0.75], [-1.5e-3]]
        values[3, ::2] = -0.0
        codes = stored(values, dtype)
        packed, loss = pack(codes, form)
        restored = unpack(packed, form)
        np.testing.assert_array_equal(restored, as_float32(codes))
        assert loss.error == 0 and not np.signbit(restored[3]).any()

    @every(FOUR_AND_EIGHT)
    def test_zeros(self, form: Form) -> None:
        values = np.zeros((2, 64), np.float32)
        values[:, ::3] = -0.0
        packed, loss = pack(values, form)
        assert loss.relative == 0 and not unpack(packed, form).any()
        assert not packed.codes.any()  # and no code of -0

    @every(FOUR_AND_EIGHT)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_huge_value(self, form: Form, dtype: str) -> None:
        values = weights("gauss", 2, 64)
        values[1, 5] = 3e4
        codes = stored(values, dtype)
        multiplier = multiplier_of(form, as_float32(codes))
        packed, _ = pack(codes, form, None, multiplier)
        restored = unpack(packed, form, multiplier)
        assert restored[1, 5] == pytest.approx(3e4, rel=0.2)
        if not form.multiplied:  # whose tensor has one range of scales
            assert relative_l2(restored[0], as_float32(codes)[0]) < 0.2

    @every(FOUR_AND_EIGHT)
    @pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-30, 1e-4, 1.0, 3e3, 1e30])
    def test_any_size(self, form: Form, size: float) -> None:
        values = stored(weights("gauss", 4, 64) * (size / 0.02), "BF16")
        multiplier = multiplier_of(form, bf16_to_f32(values))
        packed, _ = pack(values, form, None, multiplier)
        restored = unpack(packed, form, multiplier)
        assert np.isfinite(restored).all()
        if size > 1e-39:
            assert relative_l2(restored, bf16_to_f32(values)) < 0.2

    @every(FOUR_AND_EIGHT)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, form: Form, dtype: str, value: float) -> None:
        values = np.ones((4, 64), np.float32)
        values[2, 17] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            pack(stored(values, dtype), form)

    def test_beyond_what_scales_express(self) -> None:
        values = np.array([[-3e38] * 32 + [3e38] * 32], np.float32)
        with pytest.raises(ValueError, match="too far"):
            pack(values, Form(4, 64, "affine"))
        with pytest.raises(ValueError, match="too far"):
            pack(values / 3e34, Form(4, 16, "nvfp4"), None, 2.0**-7)

    @pytest.mark.parametrize("wrong", [np.ones(63), -np.ones(64), np.full(64, np.nan), np.full(64, np.inf)])
    def test_unusable_statistics(self, wrong: np.ndarray) -> None:
        with pytest.raises(ValueError, match="64 finite numbers"):
            pack(np.ones((1, 64), np.float32), Form(4, 64, "affine"), Inputs(wrong))

    def test_inputs_never_seen(self) -> None:
        """Columns without input still keep values near; a layer without any is packed as without weights."""
        values, form = weights("gauss", 4, 64), Form(4, 64, "affine")
        w = np.ones(64)
        w[10:20] = 0
        assert relative_l2(unpack(pack(values, form, Inputs(w))[0], form), values) < 0.3
        plain, _ = pack(values, form, Inputs(np.full(64, 5.0)))
        assert (pack(values, form, Inputs(np.zeros(64)))[0].codes == plain.codes).all()

    def test_inputs_that_never_vary(self) -> None:
        """Their bias makes up for all that packing does to them; other inputs may come."""
        values, form = weights("gauss", 4, 64), Form(4, 64, "affine")
        packed, loss = pack(values, form, Inputs(np.full(64, 4.0), np.full(64, -2.0)))
        assert (packed.codes == pack(values, form, Inputs(np.ones(64)))[0].codes).all() and loss.relative > 0

    def test_widths_and_multipliers_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="no multiple"):
            pack(np.ones((1, 48), np.float32), Form(4, 32, "affine"))
        with pytest.raises(ValueError, match="no output multiplier"):
            pack(np.ones((1, 64), np.float32), Form(4, 64, "affine"), None, 2.0)


def test_block_scales_of_nvfp4_stay_normal() -> None:
    """A trained network's weights, for which scales without multiplier would be subnormal."""
    values, form = f32_to_bf16(weights("gauss", 64)), Form(4, 16, "nvfp4")
    packed, _ = pack(values, form, None, multiplier_of(form, bf16_to_f32(values)))
    assert (packed.scales >= 8).all() and len(np.unique(packed.scales)) > 15
    without = pack(values, form)[0].scales
    assert (without < 8).mean() > 0.9 and len(np.unique(without)) < 15


@pytest.mark.parametrize("dtype", DTYPES)
@every(FORMS)
def test_a_layers_bias_can_keep_its_mean_output(form: Form, dtype: str) -> None:
    """The drift is what the packed codes lose, wherever it is computed."""
    values, inputs = stored(weights("shifted", 7, 384), dtype), some_inputs(384)
    assert inputs.mean is not None
    multiplier = multiplier_of(form, as_float32(values))
    packed, _ = pack(values, form, inputs, multiplier)
    change = (as_float32(values) - unpack(packed, form, multiplier)).astype(np.float64)
    assert packed.drift is not None
    np.testing.assert_allclose(packed.drift, change @ inputs.mean, rtol=1e-3, atol=1e-6)
    assert pack(values, form, Inputs(inputs.mean_square), multiplier)[0].drift is None


def test_the_loss_is_the_outputs() -> None:
    """The mean square of the output's error, for inputs whose channels do not correlate, beside the output's own."""
    values, form, rng = weights("gauss"), Form(3, 64, "affine"), np.random.default_rng(0)
    x = (rng.standard_normal((4000, 1024)) * rng.uniform(0.2, 3, 1024) + rng.uniform(-2, 2, 1024)).astype(np.float32)
    inputs = Inputs(np.square(x).mean(0), x.mean(0))
    packed, loss = pack(values, form, inputs)
    assert packed.drift is not None
    error = x @ unpack(packed, form).T + packed.drift - x @ values.T
    assert loss.error == pytest.approx(np.square(error).sum() / len(x), rel=0.03)
    assert loss.norm == pytest.approx(float((np.square(values) @ inputs.mean_square).sum()), rel=1e-4)


def test_ranges_cover_every_bit_width() -> None:
    assert affine.RANGES.keys() == affine.WEIGHTED_RANGES.keys() == affine.REFITS.keys() == set(MODES["affine"].bits)
