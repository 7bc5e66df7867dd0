//! LPIPS: how far two images are apart in the eyes of an image classifier, by the distances of its activations weighted as
//! people judged them (Zhang et al. 2018, arXiv 1801.03924); as `lpips.LPIPS` of the package `lpips` 0.1.4 computes it.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle::{DType, Device, Tensor};

use super::clip::named_files;
use crate::{
    checkpoint::{Checkpoint, is_weights, with_hint},
    device::Runtime,
    files::{Blob, Files},
    sample::{png::Image, size::ImageSize},
    ui::Reporter,
};

/// What the package's scaling layer subtracts and divides by.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];
/// Added to lengths before they divide.
const EPSILON: f64 = 1e-10;
/// Layers whose activations are compared.
const LAYERS: usize = 5;
/// What to do about a file that is of no use.
const OTHERS: &str = "name the weights of lpips.LPIPS with --lpips: net=\"alex\" or \"vgg\", its state dict as .safetensors";

/// The network under the linear heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Net {
    Alex,
    Vgg,
}

/// A convolution: its number in torchvision's `features`, padding, and stride.
type Conv = (usize, usize, usize);

impl Net {
    /// The convolutions up to each layer, a ReLU after each.
    fn slices(self) -> [&'static [Conv]; LAYERS] {
        match self {
            Self::Alex => [
                &[(0, 2, 4)],
                &[(3, 2, 1)],
                &[(6, 1, 1)],
                &[(8, 1, 1)],
                &[(10, 1, 1)],
            ],
            Self::Vgg => [
                &[(0, 1, 1), (2, 1, 1)],
                &[(5, 1, 1), (7, 1, 1)],
                &[(10, 1, 1), (12, 1, 1), (14, 1, 1)],
                &[(17, 1, 1), (19, 1, 1), (21, 1, 1)],
                &[(24, 1, 1), (26, 1, 1), (28, 1, 1)],
            ],
        }
    }

    /// Side of the pooling in front of a slice, if there is one; its stride is 2.
    fn pooling(self, slice: usize) -> Option<usize> {
        match self {
            Self::Alex => (slice == 1 || slice == 2).then_some(3),
            Self::Vgg => (slice > 0).then_some(2),
        }
    }

    /// The shortest side of an image that reaches the last layer.
    fn min_side(self) -> usize {
        match self {
            Self::Alex => 31,
            Self::Vgg => 16,
        }
    }
}

/// Files that hold an LPIPS model.
#[derive(Clone, Debug)]
pub struct LpipsFiles {
    /// As it was named, and which network it is.
    pub name: String,
    net: Net,
    weights: Checkpoint,
    reporter: Reporter,
}

impl LpipsFiles {
    /// A file, a folder or a hub id; in several files, the network may lie in one under torchvision's names, and the heads in
    /// another.
    ///
    /// # Errors
    /// When it holds no LPIPS model, before anything is sampled.
    pub fn find(name: &str, reporter: &Reporter) -> Result<Self> {
        let weights = weights(name, reporter).context("--lpips")?;
        let first = weights.dims::<4>(&weight_of(&weights, 0, 0));
        let net = match first.as_ref().map(|dims| dims[2]) {
            Ok(11) => Net::Alex,
            Ok(3) => Net::Vgg,
            _ => bail!("--lpips: `{name}` holds neither an AlexNet nor a VGG\nhint: {OTHERS}"),
        };
        let known = match net {
            Net::Alex => "AlexNet",
            Net::Vgg => "VGG",
        };
        let files = Self {
            name: format!("{name} ({known})"),
            net,
            weights,
            reporter: reporter.clone(),
        };
        // a damaged or another file is found now, not after hours
        let model = files.open(&Device::Cpu)?;
        let side = net.min_side();
        let grey = Tensor::zeros((1, 3, side, side), DType::F32, &Device::Cpu)?;
        let distance = model.distance(&grey, &grey);
        with_hint(distance, OTHERS).with_context(|| format!("--lpips: `{name}`"))?;
        Ok(files)
    }

    /// Fails at images that are too small for the network.
    ///
    /// # Errors
    /// When a side is shorter than its layers take.
    pub fn check_size(&self, size: ImageSize) -> Result<()> {
        let least = self.net.min_side();
        ensure!(
            size.width.min(size.height) >= least,
            "--lpips: `{}` takes images of at least {least}×{least} pixels",
            self.name
        );
        Ok(())
    }

    fn open(&self, device: &Device) -> Result<Lpips> {
        let get = |name: &str| -> Result<Tensor> {
            let source = self.weights.expect_floats(name);
            source?.tensor_as(DType::F32, device)
        };
        let of_slice = |(slice, convs): (usize, &[Conv])| {
            let convs = convs.iter().map(|conv| {
                let weight = weight_of(&self.weights, slice, conv.0);
                let bias = weight.replace("weight", "bias");
                anyhow::Ok((get(&weight)?, get(&bias)?.reshape((1, (), 1, 1))?, *conv))
            });
            convs.collect::<Result<Vec<_>>>()
        };
        let head = |slice: usize| {
            let names = [
                format!("lin{slice}.model.1.weight"),
                format!("lins.{slice}.model.1.weight"),
            ];
            let name = names.iter().find(|name| self.weights.contains(name));
            get(name.unwrap_or(&names[0]))
        };
        let slices = self.net.slices().into_iter().enumerate().map(of_slice);
        let read = || {
            anyhow::Ok(Lpips {
                net: self.net,
                slices: slices.collect::<Result<_>>()?,
                heads: (0..LAYERS).map(head).collect::<Result<_>>()?,
                device: device.clone(),
            })
        };
        with_hint(read(), OTHERS).context("--lpips")
    }

    /// Distances of images in the same places: of each model's, which follow the baseline's, to the baseline's.
    ///
    /// # Errors
    /// When the model does not fit into memory.
    pub fn distances(&self, images: &[Vec<Image>], runtime: &Runtime) -> Result<Vec<Vec<f64>>> {
        let (base, models) = images.split_first().context("nothing was sampled")?;
        let progress = self
            .reporter
            .progress(base.len() * models.len(), "comparing with LPIPS");
        let model = self.open(&runtime.device)?;
        let mut out = vec![Vec::new(); models.len()];
        for (place, before) in base.iter().enumerate() {
            let before = model.activations(&model.prepared(before)?)?;
            for (distances, images) in out.iter_mut().zip(models) {
                let after = model.activations(&model.prepared(&images[place])?)?;
                distances.push(model.between(&before, &after)?);
                progress.inc(1);
            }
        }
        self.reporter
            .done(&progress, format!("compared images with `{}`", self.name));
        Ok(out)
    }
}

/// The weights that `name` names.
fn weights(name: &str, reporter: &Reporter) -> Result<Checkpoint> {
    let path = Path::new(name);
    if path.is_file() {
        return Checkpoint::from_blob(name, &Blob::map(path)?);
    }
    let files: Files = named_files(name, "a .safetensors file, a folder or a hub id", reporter)?;
    let mut out: Option<Checkpoint> = None;
    for file in files.list()?.iter().filter(|file| is_weights(file)) {
        let opened = Checkpoint::from_blob(&files.describe(file), &files.read(file)?)?;
        match &mut out {
            None => out = Some(opened),
            Some(out) => {
                for (name, source) in opened.iter() {
                    out.insert(name, source.clone());
                }
            }
        }
    }
    out.with_context(|| format!("`{name}` holds no .safetensors file\nhint: {OTHERS}"))
}

/// What the weight of a convolution is called: by the package, or by torchvision.
fn weight_of(weights: &Checkpoint, slice: usize, number: usize) -> String {
    let package = format!("net.slice{}.{number}.weight", slice + 1);
    let torchvision = format!("features.{number}.weight");
    if weights.contains(&torchvision) && !weights.contains(&package) {
        torchvision
    } else {
        package
    }
}

/// An opened model.
struct Lpips {
    net: Net,
    /// Weight, bias (1, channels, 1, 1) and shape of each convolution.
    slices: Vec<Vec<(Tensor, Tensor, Conv)>>,
    /// (1, channels, 1, 1)
    heads: Vec<Tensor>,
    device: Device,
}

impl Lpips {
    /// (1, 3, height, width)
    fn prepared(&self, image: &Image) -> Result<Tensor> {
        let of = |values: [f32; 3]| Tensor::new(&values, &self.device)?.reshape((1, 3, 1, 1));
        let x = image.to_tensor()?.unsqueeze(0)?.to_device(&self.device)?;
        Ok(x.broadcast_sub(&of(SHIFT)?)?.broadcast_div(&of(SCALE)?)?)
    }

    /// Activations (1, channels, height, width) of each layer, of length 1 in every place.
    fn activations(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let (mut x, mut out) = (x.clone(), Vec::new());
        for (slice, convs) in self.slices.iter().enumerate() {
            if let Some(side) = self.net.pooling(slice) {
                x = x.max_pool2d_with_stride(side, 2)?;
            }
            for (weight, bias, (_, padding, stride)) in convs {
                let sum = x.conv2d(weight, *padding, *stride, 1, 1)?;
                x = sum.broadcast_add(bias)?.relu()?;
            }
            let length = (x.sqr()?.sum_keepdim(1)?.sqrt()? + EPSILON)?;
            out.push(x.broadcast_div(&length)?);
        }
        Ok(out)
    }

    fn between(&self, a: &[Tensor], b: &[Tensor]) -> Result<f64> {
        let mut sum = 0.0;
        for ((a, b), head) in a.iter().zip(b).zip(&self.heads) {
            let (_, _, height, width) = a.dims4()?;
            let weighted = (a - b)?.sqr()?.broadcast_mul(head)?.sum_all()?;
            sum += f64::from(weighted.to_scalar::<f32>()?) / (height * width) as f64;
        }
        Ok(sum)
    }

    fn distance(&self, a: &Tensor, b: &Tensor) -> Result<f64> {
        self.between(&self.activations(a)?, &self.activations(b)?)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::checkpoint::Source;

    /// As `scripts/golden_lpips.py` has it.
    fn hashed(place: usize, count: usize) -> impl Iterator<Item = f64> {
        let start = (place as u32).wrapping_mul(0x85EB_CA77);
        (1..=count as u32).map(move |i| {
            let mut x = i.wrapping_mul(0x9E37_79B1).wrapping_add(start);
            x ^= x >> 15;
            x = x.wrapping_mul(0x2C1B_3C6D);
            x ^= x >> 12;
            f64::from(x) / 4_294_967_296.0
        })
    }

    fn made(net: Net) -> Checkpoint {
        let (first, widths) = match net {
            Net::Alex => (vec![11, 5, 3, 3, 3], [64, 192, 384, 256, 256]),
            Net::Vgg => (vec![3; LAYERS], [64, 128, 256, 512, 512]),
        };
        let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut inputs = 3;
        for (slice, convs) in net.slices().into_iter().enumerate() {
            for (number, ..) in convs {
                let name = format!("net.slice{}.{number}", slice + 1);
                let (out, side) = (widths[slice], first[slice]);
                shapes.insert(format!("{name}.weight"), vec![out, inputs, side, side]);
                shapes.insert(format!("{name}.bias"), vec![out]);
                inputs = out;
            }
            let head = format!("lin{slice}.model.1.weight");
            shapes.insert(head, vec![1, widths[slice], 1, 1]);
        }
        let mut out = Checkpoint::default();
        for (place, (name, shape)) in shapes.into_iter().enumerate() {
            let bound = (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
            let value = |u: f64| match name.as_str() {
                name if name.starts_with("lin") => u as f32,
                name if name.ends_with("bias") => ((u - 0.5) * 0.2) as f32,
                _ => ((u - 0.5) * 2.0 * bound) as f32,
            };
            let values = hashed(place, shape.iter().product()).map(value);
            let values: Vec<f32> = values.collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            out.insert(name.as_str(), Source::dense(&tensor).unwrap());
        }
        out
    }

    #[test]
    fn distances_are_those_of_the_package() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/lpips.safetensors"
        );
        let blob = Blob::map(Path::new(path)).unwrap();
        let golden = Checkpoint::from_blob(path, &blob).unwrap();
        let image = |i: usize| {
            let source = golden.expect(&format!("image.{i}")).unwrap();
            let [height, width] = [0, 1].map(|axis| source.shape()[axis] as u32);
            let rgb = source.bytes().unwrap().into_owned();
            Image { width, height, rgb }
        };
        let expected: BTreeMap<String, Vec<f64>> =
            serde_json::from_str(&golden.metadata["distances"]).unwrap();
        for (net, name) in [(Net::Alex, "alex"), (Net::Vgg, "vgg")] {
            let files = LpipsFiles {
                name: name.to_owned(),
                net,
                weights: made(net),
                reporter: Reporter::silent(),
            };
            let model = files.open(&Device::Cpu).unwrap();
            for (pair, expected) in expected[name].iter().enumerate() {
                let [a, b] = [2 * pair, 2 * pair + 1].map(|i| model.prepared(&image(i)).unwrap());
                let found = model.distance(&a, &b).unwrap();
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{name}: {found} {expected}"
                );
                assert!(model.distance(&a, &a).unwrap() < 1e-12);
            }
        }
    }
}
