//! Which device and number format to compute with: the only place that picks one.

#[cfg(not(feature = "cuda"))]
mod stub;
#[cfg(feature = "cuda")]
mod upload;

#[cfg(not(feature = "cuda"))]
pub use stub::PageLocked;
#[cfg(feature = "cuda")]
pub use upload::{PageLocked, upload};

use std::{
    fmt,
    str::FromStr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use candle::{DType, Device};

/// A `--device` value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA or Metal when this build has it and the machine too, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA device N.
    Cuda(usize),
    /// The first Metal device.
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected auto, cpu, cuda, cuda:N or metal".to_owned()),
        }
    }
}

/// A `--dtype` value: the format of weights and activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DTypeChoice {
    /// bf16 on CUDA and Metal, f32 on the CPU.
    #[default]
    Auto,
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
}

impl FromStr for DTypeChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" => Ok(Self::F16),
            _ => Err("expected auto, f32, bf16 or f16".to_owned()),
        }
    }
}

/// Where and in which format to compute; resolved once and passed down.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// The device that holds weights and activations.
    pub device: Device,
    /// The format of weights and activations.
    pub dtype: DType,
}

impl Runtime {
    /// Resolves the choices.
    ///
    /// # Errors
    /// When the device is not in this build or not in this machine.
    pub fn resolve(device: DeviceChoice, dtype: DTypeChoice) -> Result<Self> {
        let device = match device {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda(n) => cuda(n)?,
            DeviceChoice::Metal => metal()?,
            DeviceChoice::Auto => automatic(),
        };
        let dtype = match dtype {
            DTypeChoice::F16 => DType::F16,
            DTypeChoice::Bf16 => DType::BF16,
            DTypeChoice::Auto if !device.is_cpu() => DType::BF16,
            DTypeChoice::F32 | DTypeChoice::Auto => DType::F32,
        };
        Ok(Self { device, dtype })
    }

    /// Whether convolutions write all that their taps see into memory before they multiply.
    pub fn unfolds_convolutions(&self) -> bool {
        !self.device.is_cpu() && !cfg!(feature = "cudnn")
    }

    /// Memory of the device that is free right now, in bytes; `None` if unknown.
    pub fn free_memory(&self) -> Option<u64> {
        match &self.device {
            Device::Cpu => free_host_memory(),
            Device::Cuda(_) => free_cuda_memory(),
            Device::Metal(_) => None,
        }
    }
}

/// The driver's words, and cuBLAS', for too little memory.
const WITHOUT_MEMORY: [&str; 3] = ["out of memory", "out_of_memory", "alloc_failed"];
/// Their words for a device on which nothing runs any more, whatever is asked of it.
const LOST: [&str; 12] = [
    "cuda_error_launch_failed",
    "cuda_error_launch_timeout",
    "cuda_error_illegal_address",
    "cuda_error_illegal_instruction",
    "cuda_error_hardware_stack_error",
    "cuda_error_ecc_uncorrectable",
    "cuda_error_nvlink_uncorrectable",
    "cuda_error_device_unavailable",
    "cuda_error_context_is_destroyed",
    "cuda_error_assert",
    "cuda_error_unknown",
    "cublas_status_execution_failed",
];

/// What happened to the device and what to do, if an error is of one that ran out of memory or was lost; `None` for others.
pub fn failure(error: &anyhow::Error) -> Option<&'static str> {
    let says = |words: &[&str]| {
        error.chain().any(|cause| {
            let text = cause.to_string().to_lowercase();
            words.iter().any(|words| text.contains(words))
        })
    };
    if says(&WITHOUT_MEMORY) {
        return Some(
            "the device ran out of memory\nhint: --offload keeps no block on the device, --max-vram SIZE as many as fit; smaller images (--width, --height), batches and --dtype bf16 take less too",
        );
    }
    says(&LOST).then_some(
        "the GPU stopped working for this program\nhint: run the same command again, it goes on from what it had saved; nvidia-smi and the system's log (Xid) say whether the GPU or its driver failed, and if neither did, please report this",
    )
}

/// Ends the process when the host has no more memory; allocates nothing.
pub fn exit_without_memory() -> ! {
    const TEXT: &str = "\nerror: there is no more memory on this machine\nhint: --offload reads blocks when they are run, --max-vram SIZE keeps as many as fit; smaller images (--width, --height), batches and --dtype bf16 take less too\n";
    static SAID: AtomicBool = AtomicBool::new(false);
    while SAID.swap(true, Ordering::SeqCst) {
        // another thread is about to end the process
        std::thread::sleep(Duration::from_secs(1));
    }
    // nobody may hear it: the process ends all the same
    let _ = std::io::Write::write_all(&mut std::io::stderr(), TEXT.as_bytes());
    std::process::exit(1)
}

/// Bytes that Linux says programs may still take without swapping, and this container, if it has a limit; `None` elsewhere.
pub fn free_host_memory() -> Option<u64> {
    let machine = available()?;
    Some(in_container().map_or(machine, |left| left.min(machine)))
}

/// What is left of the memory that this container may use (cgroup v2); `None` if it has no limit.
fn in_container() -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/memory.{name}")).ok();
    let limit: u64 = read("max")?.trim().parse().ok()?;
    let used: u64 = read("current")?.trim().parse().ok()?;
    // pages of files are given back when they are needed
    let stat = read("stat")?;
    let pages = stat.lines().find_map(|l| l.strip_prefix("inactive_file "));
    let pages: u64 = pages?.trim().parse().ok()?;
    Some(limit.saturating_sub(used.saturating_sub(pages)))
}

fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(feature = "cuda")]
fn free_cuda_memory() -> Option<u64> {
    let (free, _) = candle::cuda_backend::cudarc::driver::result::mem_get_info().ok()?;
    Some(free as u64)
}

#[cfg(not(feature = "cuda"))]
fn free_cuda_memory() -> Option<u64> {
    None
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = match &self.device {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
            Device::Metal(_) => "metal",
        };
        write!(f, "{device}, {}", self.dtype.as_str())
    }
}

/// Why a GPU was passed over.
static UNUSED: OnceLock<String> = OnceLock::new();

/// Why no GPU is used if no flag names a device, although there seems to be one.
pub fn unused_gpu() -> Option<&'static str> {
    UNUSED.get().map(String::as_str)
}

fn automatic() -> Device {
    if cfg!(feature = "cuda") {
        match Device::new_cuda(0) {
            Ok(device) => return device,
            Err(why) => {
                let why = why.to_string();
                // candle appends its backtrace
                let why = why.lines().next().unwrap_or_default();
                // a machine without a GPU is nothing to talk about; a driver that fails is
                if !why.contains("NO_DEVICE") {
                    UNUSED.get_or_init(|| why.to_owned());
                }
            }
        }
    }
    if cfg!(feature = "metal")
        && let Ok(device) = Device::new_metal(0)
    {
        return device;
    }
    Device::Cpu
}

fn cuda(ordinal: usize) -> Result<Device> {
    if !cfg!(feature = "cuda") {
        bail!(
            "--device cuda: this build has no CUDA support\nhint: build with `cargo build --release --features cuda`, or use --device cpu"
        );
    }
    Device::new_cuda(ordinal)
        .with_context(|| format!("--device cuda:{ordinal}: cannot use this GPU\nhint: see `nvidia-smi`, or use --device cpu"))
}

fn metal() -> Result<Device> {
    if !cfg!(feature = "metal") {
        bail!(
            "--device metal: this build has no Metal support\nhint: build with `cargo build --release --features metal`, or use --device cpu"
        );
    }
    Device::new_metal(0).context("--device metal: cannot use the GPU\nhint: use --device cpu")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_device_says_what_to_do() {
        let driver = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let error = anyhow::anyhow!("{driver}").context("cannot load the transformer of `x`");
        let advice = failure(&error).unwrap();
        assert!(advice.contains("\nhint: --offload"), "{advice}");
        let cublas = anyhow::anyhow!("CublasError(CUBLAS_STATUS_ALLOC_FAILED)");
        assert_eq!(failure(&cublas), Some(advice));
        let driver = "DriverError(CUDA_ERROR_LAUNCH_FAILED, \"unspecified launch failure\")";
        let lost = anyhow::anyhow!("{driver}").context("cannot load the VAE `x`");
        assert!(failure(&lost).unwrap().starts_with("the GPU stopped"));
        assert_eq!(failure(&anyhow::anyhow!("no such file")), None);
    }
}
