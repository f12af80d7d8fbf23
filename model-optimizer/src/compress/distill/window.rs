//! Windows that slide over an image of any number of dimensions: convolution and pooling as gathering and matrix products.
//!
//! A window is written as the list of the image's positions that it covers, so that padding, strides and dilations of every kind are
//! one and the same, and so that gradients are those of gathering.

use candle_core::{Device, Result, Tensor, bail};

use super::operators::Call;

/// What candle's gathering takes as a zero, and its scattering leaves out.
const OUTSIDE: u32 = u32::MAX;

/// How a window slides.
struct Window {
    image: Vec<usize>,
    out: Vec<usize>,
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    /// Padding before the first pixel of each axis.
    before: Vec<usize>,
}

impl Window {
    /// The window that the attributes of a convolution or pooling describe.
    fn of(call: &Call, image: &[usize], kernel: &[usize]) -> Result<Self> {
        let rank = image.len();
        let (strides, dilations) = (call.sizes("strides", rank, 1)?, call.sizes("dilations", rank, 1)?);
        let pads = call.sizes("pads", 2 * rank, 0)?;
        let (mut before, mut out) = (Vec::with_capacity(rank), Vec::with_capacity(rank));
        for axis in 0..rank {
            let covered = dilations[axis] * (kernel[axis] - 1) + 1;
            let (start, end) = match call.text("auto_pad") {
                "SAME_UPPER" | "SAME_LOWER" => {
                    let total = ((image[axis].div_ceil(strides[axis]) - 1) * strides[axis] + covered).saturating_sub(image[axis]);
                    let smaller = total / 2;
                    if call.text("auto_pad") == "SAME_UPPER" {
                        (smaller, total - smaller)
                    } else {
                        (total - smaller, smaller)
                    }
                }
                "VALID" => (0, 0),
                _ => (pads[axis], pads[rank + axis]),
            };
            let Some(room) = (image[axis] + start + end).checked_sub(covered) else {
                bail!("its window is larger than its image");
            };
            let mut count = room / strides[axis] + 1;
            // A further window that begins within the image or before it.
            if call.integer("ceil_mode", 0) != 0 && room % strides[axis] != 0 && count * strides[axis] < image[axis] + start {
                count += 1;
            }
            before.push(start);
            out.push(count);
        }
        Ok(Self {
            image: image.to_vec(),
            out,
            kernel: kernel.to_vec(),
            strides,
            dilations,
            before,
        })
    }

    /// For every place of the window and every element of it, in this order, the position in the flattened image.
    fn positions(&self) -> Vec<u32> {
        let mut positions = vec![0_u32];
        // Axis by axis: the positions of all axes before, times this axis's.
        let (mut places, mut elements) = (1, 1);
        for axis in 0..self.image.len() {
            let (out, kernel) = (self.out[axis], self.kernel[axis]);
            let mut next = Vec::with_capacity(positions.len() * out * kernel);
            for place in 0..places {
                for out_place in 0..out {
                    for element in 0..elements {
                        let outer = positions[place * elements + element];
                        for tap in 0..kernel {
                            let at = (out_place * self.strides[axis] + tap * self.dilations[axis]).checked_sub(self.before[axis]);
                            next.push(match at.filter(|at| *at < self.image[axis] && outer != OUTSIDE) {
                                Some(at) => outer * self.image[axis] as u32 + at as u32,
                                None => OUTSIDE,
                            });
                        }
                    }
                }
            }
            positions = next;
            places *= out;
            elements *= kernel;
        }
        positions
    }

    fn places(&self) -> usize {
        self.out.iter().product()
    }

    fn elements(&self) -> usize {
        self.kernel.iter().product()
    }
}

/// `[batch, channels, ...]` as pixels, `[batch, pixels, channels]`.
fn pixels(images: &Tensor) -> Result<Tensor> {
    images.flatten_from(2)?.transpose(1, 2)?.contiguous()
}

/// Pixels as images of the given size.
fn images(pixels: &Tensor, size: &[usize]) -> Result<Tensor> {
    let (batch, _, channels) = pixels.dims3()?;
    let shape: Vec<usize> = [batch, channels].iter().chain(size).copied().collect();
    pixels.transpose(1, 2)?.contiguous()?.reshape(shape)
}

fn index(positions: Vec<u32>, device: &Device) -> Result<Tensor> {
    let count = positions.len();
    Tensor::from_vec(positions, count, device)
}

/// `Conv`: of one, two or more dimensions, in groups.
pub(super) fn convolve(call: &Call) -> Result<Vec<Tensor>> {
    let (input, weight) = (call.input(0)?, call.input(1)?);
    let (batch, channels) = (input.dim(0)?, input.dim(1)?);
    let (filters, group_channels) = (weight.dim(0)?, weight.dim(1)?);
    let groups = call.size("group", 1)?;
    if groups == 0 || group_channels * groups != channels || !filters.is_multiple_of(groups) {
        bail!("its weight does not fit {channels} channels in {groups} groups");
    }
    let window = Window::of(call, &input.dims()[2..], &weight.dims()[2..])?;
    let (places, elements) = (window.places(), window.elements());
    let covered = pixels(input)?.index_select(&index(window.positions(), input.device())?, 1)?;
    // [filters, group's channels, elements]
    let weight = weight.flatten_from(2)?;
    let product = if groups == 1 {
        let rows = covered.reshape((batch * places, elements * channels))?;
        rows.matmul(&weight.permute((2, 1, 0))?.contiguous()?.reshape((elements * channels, filters))?)?
    } else if group_channels == 1 && filters == channels {
        // Depthwise: a sum over the window for each channel by itself.
        let taps = weight.reshape((channels, elements))?.t()?.contiguous()?;
        covered
            .reshape((batch * places, elements, channels))?
            .broadcast_mul(&taps)?
            .sum(1)?
    } else {
        let rows = covered
            .reshape((batch * places, elements, groups, group_channels))?
            .permute((2, 0, 1, 3))?
            .contiguous()?;
        let rows = rows.reshape((groups, batch * places, elements * group_channels))?;
        let weight = weight
            .reshape((groups, filters / groups, group_channels, elements))?
            .permute((0, 3, 2, 1))?
            .contiguous()?;
        let product = rows.matmul(&weight.reshape((groups, elements * group_channels, filters / groups))?)?;
        product.transpose(0, 1)?.contiguous()?
    };
    let mut product = product.reshape((batch, places, filters))?;
    if let Some(bias) = call.optional(2) {
        product = product.broadcast_add(bias)?;
    }
    Ok(vec![images(&product, &window.out)?])
}

/// `ConvTranspose`: each pixel adds the weight, times itself, to the window that it stands for.
pub(super) fn convolve_transposed(call: &Call) -> Result<Vec<Tensor>> {
    let (input, weight) = (call.input(0)?, call.input(1)?);
    let rank = input.rank() - 2;
    let (batch, channels, filters) = (input.dim(0)?, input.dim(1)?, weight.dim(1)?);
    let groups = call.size("group", 1)?;
    if groups == 0 || weight.dim(0)? != channels || !channels.is_multiple_of(groups) {
        bail!("its weight does not fit {channels} channels in {groups} groups");
    }
    if !matches!(call.text("auto_pad"), "" | "NOTSET") || call.ints("output_shape").is_some() {
        bail!("its padding is given by the size of its output");
    }
    let (kernel, image) = (weight.dims()[2..].to_vec(), &input.dims()[2..]);
    let (strides, dilations) = (call.sizes("strides", rank, 1)?, call.sizes("dilations", rank, 1)?);
    let (pads, further) = (call.sizes("pads", 2 * rank, 0)?, call.sizes("output_padding", rank, 0)?);
    let size = |axis: usize| {
        let whole = (image[axis] - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1 + further[axis];
        whole.checked_sub(pads[axis] + pads[rank + axis])
    };
    let Some(size) = (0..rank).map(size).collect::<Option<Vec<usize>>>() else {
        bail!("its padding is larger than its output");
    };
    let window = Window {
        image: size.clone(),
        out: image.to_vec(),
        kernel,
        strides,
        dilations,
        before: pads[..rank].to_vec(),
    };
    let (places, elements, group_channels) = (window.places(), window.elements(), channels / groups);
    let at = index(window.positions(), input.device())?;
    let (input, weight) = (pixels(input)?, weight.flatten_from(2)?);
    let mut outputs = Vec::with_capacity(groups);
    for group in 0..groups {
        let rows = input.narrow(2, group * group_channels, group_channels)?.contiguous()?;
        let weight = weight
            .narrow(0, group * group_channels, group_channels)?
            .transpose(1, 2)?
            .contiguous()?;
        let rows = rows
            .reshape((batch * places, group_channels))?
            .matmul(&weight.reshape((group_channels, elements * filters))?)?;
        let empty = Tensor::zeros((batch, size.iter().product(), filters), rows.dtype(), rows.device())?;
        outputs.push(empty.index_add(&at, &rows.reshape((batch, places * elements, filters))?, 1)?);
    }
    let mut output = Tensor::cat(&outputs, 2)?;
    if let Some(bias) = call.optional(2) {
        output = output.broadcast_add(bias)?;
    }
    Ok(vec![images(&output, &size)?])
}

/// The window's elements of every place, `[batch, places, elements, channels]`, with which of them lie outside of the image.
fn pooled(call: &Call) -> Result<(Window, Tensor, Vec<bool>)> {
    let input = call.input(0)?;
    let Some(kernel) = call.ints("kernel_shape") else {
        bail!("it has no kernel_shape");
    };
    let kernel: Vec<usize> = kernel.iter().map(|&size| size.max(0) as usize).collect();
    if kernel.len() != input.rank() - 2 || kernel.contains(&0) {
        bail!("its kernel_shape {kernel:?} does not fit its input {:?}", input.dims());
    }
    let window = Window::of(call, &input.dims()[2..], &kernel)?;
    let positions = window.positions();
    let outside = positions.iter().map(|position| *position == OUTSIDE).collect();
    let covered = pixels(input)?.index_select(&index(positions, input.device())?, 1)?;
    let covered = covered.reshape((input.dim(0)?, window.places(), window.elements(), input.dim(1)?))?;
    Ok((window, covered, outside))
}

/// `MaxPool`; of equal values the first one takes the gradient.
pub(super) fn max_pool(call: &Call) -> Result<Vec<Tensor>> {
    let (window, mut covered, outside) = pooled(call)?;
    if outside.contains(&true) {
        let floor: Vec<f32> = outside
            .iter()
            .map(|outside| if *outside { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let floor = Tensor::from_vec(floor, (window.places(), window.elements(), 1), covered.device())?;
        covered = covered.broadcast_add(&floor.to_dtype(covered.dtype())?)?;
    }
    let largest = covered.gather(&covered.detach().argmax_keepdim(2)?, 2)?;
    Ok(vec![images(&largest.squeeze(2)?, &window.out)?])
}

/// `AveragePool`, of the pixels alone or, with `count_include_pad`, of the padding as well.
pub(super) fn average_pool(call: &Call) -> Result<Vec<Tensor>> {
    let (window, covered, outside) = pooled(call)?;
    let padding = call.integer("count_include_pad", 0) != 0;
    if padding && call.integer("ceil_mode", 0) != 0 {
        bail!("count_include_pad together with ceil_mode has no one meaning");
    }
    let share = |place: &[bool]| {
        let counted = place.iter().filter(|outside| padding || !**outside).count();
        1.0 / counted.max(1) as f32
    };
    let shares: Vec<f32> = outside.chunks_exact(window.elements()).map(share).collect();
    let shares = Tensor::from_vec(shares, (window.places(), 1), covered.device())?.to_dtype(covered.dtype())?;
    Ok(vec![images(&covered.sum(2)?.broadcast_mul(&shares)?, &window.out)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_covers_what_it_should_and_zeros_elsewhere() {
        let window = Window {
            image: vec![2, 3],
            out: vec![1, 2],
            kernel: vec![2, 2],
            strides: vec![1, 2],
            dilations: vec![1, 1],
            before: vec![0, 1],
        };
        // Places (0, 0) and (0, 1); elements row by row.
        assert_eq!(window.positions(), [OUTSIDE, 0, OUTSIDE, 3, 1, 2, 4, 5]);
    }
}
