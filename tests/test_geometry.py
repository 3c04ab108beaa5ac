"""Groups, shifts and crops."""
import pytest

from timm_shiftwise import geometry

LENGTHS = [(51, 5), (49, 5), (47, 5), (13, 5), (7, 3), (8, 4), (9, 4), (6, 2), (3, 5), (4, 4), (5, 1), (1, 1), (1, 3)]


@pytest.mark.parametrize('focus_length, kernel_size', LENGTHS)
def test_groups_cover_the_focus_length_and_none_is_idle(focus_length, kernel_size):
    groups = geometry.num_groups(focus_length, kernel_size)
    assert (groups - 1) * kernel_size < focus_length <= groups * kernel_size


@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('focus_length, kernel_size', LENGTHS)
def test_a_place_reads_where_the_large_kernel_has_its_columns(focus_length, kernel_size, padding):
    """The map's column that output column w reads is the small convolution at x[w + place * N - M // 2] onwards."""
    pad = geometry.small_padding(kernel_size, padding)
    for place in range(geometry.num_groups(focus_length, kernel_size)):
        shift = geometry.shift(place, focus_length, kernel_size, padding)
        first_pixel_of_map_column = -pad - shift
        assert first_pixel_of_map_column == place * kernel_size - focus_length // 2
    assert geometry.crop(kernel_size, padding) - pad == -(kernel_size // 2)


@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('kernel_size', [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize('size', [1, 2, 7, 14, 31])
def test_map_and_image_sizes_are_inverse_and_the_crop_stays_inside(size, kernel_size, padding):
    side = geometry.map_size(size, kernel_size, padding)
    assert geometry.image_size(side, kernel_size, padding) == size
    crop = geometry.crop(kernel_size, padding)
    assert 0 <= crop and crop + size <= side


@pytest.mark.parametrize('padding', ['full', 'same'])
@pytest.mark.parametrize('focus_length, kernel_size', LENGTHS)
@pytest.mark.parametrize('size', [1, 5, 14])
def test_every_read_falls_inside_a_map_with_its_margin(focus_length, kernel_size, padding, size):
    margin = geometry.margin(focus_length, kernel_size, padding)
    side = geometry.map_size(size, kernel_size, padding)
    shifts = [
        geometry.shift(place, focus_length, kernel_size, padding)
        for place in range(geometry.num_groups(focus_length, kernel_size))]
    assert all(-margin <= -s and size - s <= side + margin for s in shifts)


@pytest.mark.parametrize('value', [0, -1, 2.0, '5', None, True])
@pytest.mark.parametrize('name', ['focus_length', 'kernel_size'])
def test_what_is_no_length_is_refused_by_name_and_value(name, value):
    arguments = {'focus_length': 13, 'kernel_size': 5, 'padding': 'full', name: value}
    with pytest.raises(ValueError, match=f'{name} must be an integer of at least 1, got {value!r}'):
        geometry.check_geometry(**arguments)


def test_an_unknown_padding_policy_is_refused_with_those_allowed():
    with pytest.raises(ValueError, match="'full' or 'same', got 'valid'"):
        geometry.check_geometry(13, 5, 'valid')
