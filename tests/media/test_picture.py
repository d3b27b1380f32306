"""Pictures that users give: their colours, their orientation, what is wrong with them, and how they are cut to size."""

from base64 import b85decode
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import decompress

import numpy as np
import pytest
from PIL import Image, ImageCms

from ltx2.runtime.errors import InputError
from ltx2.runtime.media.picture import compressed, covering, read_picture, write_picture
from tests.support.media import noise_frames, write_frames
from tests.support.parity import require

Array = np.ndarray[Any, Any]

# Columns are a space's red, green and blue in XYZ under D50, as profiles state them.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
# 64x64: red on the left, blue on the right.
HEIC = (
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<00042ZDn*}000000000XXk=`10000000000aA{+700000000000000000000B57=IV*mgE07O6l"
    "0RRC200001dH?|c00000001rk001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F#rGn01j|zbZr0t000010002iX>f9I0002DX>en20001Z"
    "Xm(>m0RwOV0058x000009`FGC{rLC*01pFT0096PKmiN^|NjGU00093kN^M!000939=ZZRVE_RDD?$MQ18@KU0|1Z!00RI30{|YNAb|yz>PacC"
    "ZUPz%2mk;B0LTCU0{{p>VgLaE2SfqEa<C#m0000JV{dG7ZewhC0096E00w{n000zeb8uw<00000002M$002M$000nhX?SS>000032nYxO000+h"
    "aBX1#00000000310R({p0|Wp705)x8VRQfh04gW}uLSr(GHKiYnP30^?g71*^k~pw2lkdc`}{oa|NgER=XRTCzl=ZN"
)

# 96x64, turned by a quarter, in Display P3: compressed by zlib.
TURNED = (
    "c-oayO-vI(6#lkLp#p-a7*eo7BZ>+tViZl(QbdA+A&3e7({8tPl5V@%7Hw4ygs2w}7>$V@6!g&GLGcEn0rlcR5)+LY#h;Uj#wh+FNv-RfZX<-~!M"
    "B~AZ@+o(_09KY02Fva5!EX*31kZMlyR&urw0(<DsspP!xnhmJ}rr%GAV><wubovi6mR>FhSrbCEb|G+KJ=L$v?~@8WoKBJ&7;AnoA#Y!i{{qhomx"
    "0AqDPI9cBslER}^6Bt69<rfMq9W~NF3;=&YLC5S|!E8%1t!_WA{1duJZP(+?x$P{#)JBZvv<UiX@lif*+%N>F+ZKZovhxy$5+NIb0c~+B!Q}_AHV"
    "t0{$+7{uC*0<13TWFR7K26mERHCWQCn>=cVikW#Ypih;Ht*h3nD!nSn2&i_2CGvFs+A25b@-=^KQXj=RLXPV|185T2dNtZm5a5Ks!_WHss?q3Ln_"
    "Co2+x(gPB-Ch!X+9NNcaKgT?T%`ajSv9ajZ2pR?*&g&cfCy*fj-9UX40qD&`$ld~H&)9=?-I*}rQi%~l!(2%-@+aG($_w1L5g5K3wGlV*R9Ta}30"
    "fdIuw^i~mpMiH&>QfvvaZIo4}*+aZcj}H;9`*b~np7Pa3_Dlz0ex>VQi-5E<K)g%WV?DYazf2t-1%~~T@tv=MjYGPw4^DE$6+lh~aDQNu+cpH;SO"
    "=sJs7}qeJ|aKi9y%9aqQK1Ez?_G)zSqzyxsEGOfu^I>q7mTy1z<7xXYb>>v!E&`^=P5N`#4KwVU`HBSh(&pm=*}}G<i%_oPWd<%pE2%<v16eX|gB"
    "DXGv~49Q=}UL3$Opli%h@v2Z=LU+NpxM@Dpg;`_m#UuB;wk6j%3m8-YMV$1b-O?ZEQbxrhf=D4psx;B4U*>tybNL!!xg1uYu^5fv`^Y;#%Zhvtk="
    "hF7>b!XwSJ#5)fH})YnwsqxGTYhh6^wZ{DwI#71;U%}O);EjKo`129kDh268lyi?HLiAjJ>3n!0zsIaP(?thQS)yYl=(O"
)


def noise(height: int = 20, width: int = 30) -> Array:
    return noise_frames(1, height, width)[0]


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def display_p3() -> bytes:
    """A profile: Pillow's sRGB with other primaries; both have the same curves."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, colour in zip((b"rXYZ", b"gXYZ", b"bXYZ"), DISPLAY_P3.T, strict=True):
        entry = data.index(tag)  # in the table of tags: name, place, length
        place = int.from_bytes(data[entry + 4 : entry + 8], "big")
        data[place + 8 : place + 20] = np.round(colour * 65536).astype(">i4").tobytes()
    return bytes(data)


def as_srgb(picture: Array) -> Array:
    """Of Display P3, by the formula: to linear light, to sRGB's primaries, back; what they cannot show is cut."""
    levels = picture / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_a_display_p3_picture_becomes_srgb(tmp_path: Path, suffix: str) -> None:
    colours = np.array([[[255, 0, 0], [200, 60, 40], [40, 160, 90], [128, 128, 128], [20, 30, 200]]], np.uint8)
    picture = colours.repeat(16, 0).repeat(16, 1)
    lossy = {} if suffix in ("png", "tif") else {"quality": 100, "subsampling": "4:4:4"}
    lossy |= {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(picture), icc_profile=display_p3(), **lossy)
    made = read_picture(path)[8, 8::16].astype(float)
    np.testing.assert_allclose(made, as_srgb(colours[0]), atol=1 if suffix in ("png", "tif", "webp") else 4)
    assert np.abs(made - colours[0]).max() > 20  # that is what is seen without the profile


def test_profiles_of_other_colours(tmp_path: Path) -> None:
    grey = Image.fromarray(noise()[..., 0])
    wide = saved(tmp_path / "a.png", grey, icc_profile=display_p3())  # grey is grey in both
    np.testing.assert_allclose(read_picture(wide)[..., 1].astype(int), np.asarray(grey), atol=1)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, data in (("b.png", b"no profile at all"), ("c.png", lab)):
        with pytest.raises(InputError, match="colour profile cannot be applied"):
            read_picture(saved(tmp_path / name, Image.fromarray(noise()), icc_profile=data))


LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 100}}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    picture = np.zeros((24, 40, 3), np.uint8)
    picture[:12, :20], picture[:12, 20:], picture[12:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = picture  # so that, turned, the picture is seen
    turns: dict[int, Any] = {
        2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1),
    }  # fmt: skip
    if orientation in turns:
        stored = np.ascontiguousarray(turns[orientation](picture))
    exif = Image.Exif()
    exif[0x112] = orientation
    made = read_picture(saved(tmp_path / f"a.{suffix}", Image.fromarray(stored), exif=exif, **LOSSLESS.get(suffix, {})))
    assert made.shape == picture.shape
    np.testing.assert_allclose(made[6::12, 10::20].astype(int), picture[6::12, 10::20], atol=2)


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "gif", "dds"])
def test_as_it_is(tmp_path: Path, suffix: str) -> None:
    """Pillow's formats, and one that ffmpeg reads."""
    picture = noise() // 64 * 64 if suffix == "gif" else noise()
    np.testing.assert_array_equal(read_picture(saved(tmp_path / f"a.{suffix}", Image.fromarray(picture))), picture)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    picture = noise()
    clear = np.concatenate([picture, np.full((20, 30, 1), 70, np.uint8)], axis=2)
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "a.png", Image.fromarray(clear))), picture)
    few = Image.fromarray(picture).quantize(16)
    colours = np.asarray(few.convert("RGB"))
    few.info["transparency"] = bytes(range(16))
    np.testing.assert_array_equal(read_picture(saved(tmp_path / "b.png", few)), colours)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_8_and_16_bits(tmp_path: Path, suffix: str) -> None:
    grey = noise()[..., 0]
    fine = grey.astype(np.uint16) * 256 + 77
    for stored in (grey, fine):
        made = read_picture(saved(tmp_path / f"a.{suffix}", Image.fromarray(stored)))
        np.testing.assert_array_equal(made, np.repeat(grey[..., None], 3, axis=2))


def test_16_bits_of_colour(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "a.png", noise()[None], "-pix_fmt", "rgb48be")
    np.testing.assert_allclose(read_picture(path).astype(int), noise(), atol=1)


def test_values_in_no_known_range_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(noise()[..., 0].astype(np.float32)))
    with pytest.raises(InputError, match="32 bits"):
        read_picture(path)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    picture = np.zeros((32, 32, 3), np.uint8) + np.array([220, 90, 30], np.uint8)
    options = {"quality": 100} if suffix == "jpg" else {}
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(picture).convert("CMYK"), **options)
    np.testing.assert_allclose(read_picture(path).astype(int), picture, atol=3)
    wrong = saved(tmp_path / f"b.{suffix}", Image.fromarray(picture).convert("CMYK"), icc_profile=display_p3())
    with pytest.raises(InputError, match="of RGB colours, and the picture of CMYK"):
        read_picture(wrong)


def test_the_first_of_several(tmp_path: Path) -> None:
    first, second = (Image.fromarray(noise() // 64 * 64 + level) for level in (0, 20))
    for suffix in ("gif", "png", "webp", "tif"):
        options = LOSSLESS.get(suffix, {})
        path = saved(tmp_path / f"a.{suffix}", first, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(read_picture(path), np.asarray(first))


def whole(suffix: str) -> bytes:
    file = BytesIO()
    Image.fromarray(noise(80, 90)).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "gif", "bmp"])
def test_what_is_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole(suffix)[: len(whole(suffix)) // 2])
    with pytest.raises(InputError, match="cannot read"):
        read_picture(path)


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    """Where it can be known: a JPEG that lacks its middle but has its end, a PNG with a wrong sum."""
    path, data = tmp_path / "a.jpg", whole("jpg")
    path.write_bytes(data[: len(data) // 2] + data[-2:])
    with pytest.raises(InputError, match="cannot read"):
        read_picture(path)
    data = whole("png")
    place = data.index(b"IEND") - 8  # the sum of the pixels' chunk
    (path := tmp_path / "a.png").write_bytes(data[:place] + b"\0\0\0\0" + data[place + 4 :])
    with pytest.raises(InputError, match="cannot read"):
        read_picture(path)


def test_of_a_phone(tmp_path: Path) -> None:
    """A HEIC, turned and in sRGB."""
    (path := tmp_path / "my photo.heic").write_bytes(b85decode(HEIC))
    made = read_picture(path)
    np.testing.assert_allclose(made[32, 8], (200, 60, 40), atol=4)
    np.testing.assert_allclose(made[32, 56], (30, 80, 180), atol=4)
    path.write_bytes(data := decompress(b85decode(TURNED)))
    made = read_picture(path)
    assert made.shape == (96, 64, 3)
    wanted = as_srgb(np.array([(200, 60, 40), (30, 80, 180)]))
    np.testing.assert_allclose(made[[8, 88], 32], wanted, atol=4)
    path.write_bytes(b85decode(HEIC).replace(b"nclx\0\x01", b"nclx\0\x0c"))
    with pytest.raises(InputError, match="wide colours"):
        read_picture(path)
    for length in (len(data) - 40, len(data) // 2, 100):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="cut off or damaged"):
            read_picture(path)


def test_writing(tmp_path: Path) -> None:
    write_picture(tmp_path / "a", noise())
    np.testing.assert_array_equal(read_picture(tmp_path / "a"), noise())
    assert (tmp_path / "a").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wanted", [(20, 30), (64, 32), (16, 48), (7, 5)])
def test_covering_as_torch_does(wanted: tuple[int, int]) -> None:
    torch = require("torch")
    frames = noise_frames(2, 20, 30)
    height, width = wanted
    scale = max(height / 20, width / 30)
    size = int(np.ceil(20 * scale)), int(np.ceil(30 * scale))
    tensor = torch.tensor(frames.astype(np.float32)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    want = resized[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).numpy() / 127.5 - 1
    np.testing.assert_allclose(covering(frames, height, width), want, atol=2e-5)


def test_compressing() -> None:
    picture = noise(33, 47)
    coarse, fine = compressed(picture, 40), compressed(picture, 5)
    assert coarse.shape == fine.shape == (32, 46, 3)
    errors = [np.abs(made.astype(int) - picture[:32, :46]).mean() for made in (fine, coarse)]
    assert 0 < errors[0] < errors[1]
    assert compressed(picture, 0) is picture
