//! Measures how long work takes and how much memory it needs: warm-up, median and quartiles, peak.

use std::time::Instant;

use anyhow::Result;
use candle::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;

/// Durations of the same work, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Timing {
    /// How often it was measured.
    pub runs: usize,
    /// The middle one.
    pub median: f64,
    /// The shortest.
    pub least: f64,
    /// A quarter took at most this long.
    pub low: f64,
    /// A quarter took at least this long.
    pub high: f64,
    /// The middle time until all work had been handed to the device; the same as the others on a CPU. Where it comes
    /// close to them the device waits for its instructions.
    pub launched: f64,
}

impl Timing {
    /// Statistics of durations in seconds; all zero if there are none.
    pub fn from_samples(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return Self::default();
        };
        let at = |share: f64| {
            let place = share * last as f64;
            let (below, above) = (
                sorted[place.floor() as usize],
                sorted[place.ceil() as usize],
            );
            below + (above - below) * place.fract()
        };
        Self {
            runs: sorted.len(),
            median: at(0.5),
            least: at(0.0),
            low: at(0.25),
            high: at(0.75),
            launched: 0.0,
        }
    }
}

/// How often to repeat.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Runs that do not count, first.
    pub warm_up: usize,
    /// Runs that count, at least.
    pub min_runs: usize,
    /// Runs that count, at most.
    pub max_runs: usize,
    /// Stop when those that count have taken this long, in seconds.
    pub seconds: f64,
}

impl Effort {
    fn is_over(&self, samples: &[f64]) -> bool {
        let spent = samples.iter().sum::<f64>() >= self.seconds;
        samples.len() >= self.max_runs || (samples.len() >= self.min_runs && spent)
    }
}

/// Times each of `works` (in turn, so that a busy machine slows all of them alike). The device is
/// synchronised before and after each run.
///
/// # Errors
/// When one of them fails.
pub fn measure(
    device: &Device,
    effort: Effort,
    works: &mut [&mut dyn FnMut() -> Result<()>],
) -> Result<Vec<Timing>> {
    let mut samples = vec![Vec::new(); works.len()];
    let mut launched = samples.clone();
    for work in works.iter_mut() {
        for _ in 0..effort.warm_up {
            work()?;
        }
    }
    device.synchronize()?;
    while samples.iter().any(|s| !effort.is_over(s)) {
        let all = samples.iter_mut().zip(&mut launched);
        for (work, (samples, launched)) in works.iter_mut().zip(all) {
            let start = Instant::now();
            work()?;
            launched.push(start.elapsed().as_secs_f64());
            device.synchronize()?;
            samples.push(start.elapsed().as_secs_f64());
        }
    }
    let each = samples
        .iter()
        .zip(&launched)
        .map(|(samples, launched)| Timing {
            launched: Timing::from_samples(launched).median,
            ..Timing::from_samples(samples)
        });
    Ok(each.collect())
}

/// What a device reaches at most, measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Peak {
    /// Operations per second of a large matrix product.
    pub flops: f64,
    /// Bytes read and written per second by a large copy.
    pub bytes: f64,
}

/// Measures a matrix product and a copy in a number format.
///
/// # Errors
/// When the device has too little memory.
pub fn peak(device: &Device, dtype: DType) -> Result<Peak> {
    let (side, megabytes) = if device.is_cpu() {
        (1536, 128)
    } else {
        (8192, 1024)
    };
    let effort = Effort {
        warm_up: 1,
        min_runs: 4,
        max_runs: 50,
        seconds: 0.4,
    };
    let random = |shape: (usize, usize)| -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype)?)
    };
    let (a, b) = (random((side, side))?, random((side, side))?);
    let elements = (megabytes << 20) / dtype.size_in_bytes();
    let product = &mut || {
        a.matmul(&b)?;
        Ok(())
    };
    // the best of all: what a machine reaches is not what it reaches while something else runs
    let product = measure(device, effort, &mut [product])?[0].least;
    let copy = if device.is_cpu() {
        // on all cores, into memory that is there already
        let from = vec![1u8; megabytes << 20];
        let mut to = vec![0u8; megabytes << 20];
        let work = &mut || {
            let parts = to.par_chunks_mut(1 << 20).zip(from.par_chunks(1 << 20));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
            Ok(())
        };
        measure(device, effort, &mut [work])?[0].least
    } else {
        let from = Tensor::ones(elements, dtype, device)?;
        let work = &mut || {
            // the driver's own copy: candle's kernel for parts of tensors moves a number at a time
            from.copy()?;
            Ok(())
        };
        measure(device, effort, &mut [work])?[0].least
    };
    Ok(Peak {
        flops: 2.0 * (side as f64).powi(3) / product,
        bytes: 2.0 * (elements * dtype.size_in_bytes()) as f64 / copy,
    })
}

/// Watches the memory of this process and of the device.
#[derive(Debug)]
pub struct MemoryWatch {
    /// Whether the system forgot earlier peaks.
    fresh: bool,
    free_before: Option<u64>,
    least_free: Option<u64>,
}

impl MemoryWatch {
    /// Starts; `free` is the device's free memory now, if it has memory of its own.
    pub fn start(free: Option<u64>) -> Self {
        Self {
            // Linux: 5 makes the peak what is used now
            fresh: std::fs::write("/proc/self/clear_refs", "5").is_ok(),
            free_before: free,
            least_free: free,
        }
    }

    /// Records the device's free memory, in bytes.
    pub fn sample(&mut self, free: Option<u64>) {
        self.least_free = self.least_free.min(free);
    }

    /// Most memory of this process since the start, in bytes, with the parts of mapped files that are in memory; `None`
    /// if the system does not say.
    pub fn host(&self) -> Option<u64> {
        self.fresh.then(most_resident).flatten()
    }

    /// The same without the parts of mapped files that are in memory now.
    pub fn host_without_files(&self) -> Option<u64> {
        Some(self.host()?.saturating_sub(status("RssFile:")?))
    }

    /// Memory of this process now, in bytes, without the parts of mapped files; `None` if the system does not say.
    pub fn host_now() -> Option<u64> {
        status("RssAnon:")
    }

    /// Most memory taken on the device since the start, between the calls of [`Self::sample`], in bytes.
    pub fn device(&self) -> Option<u64> {
        Some(self.free_before?.saturating_sub(self.least_free?))
    }
}

/// The largest resident set of this process, in bytes.
fn most_resident() -> Option<u64> {
    status("VmHWM:")
}

/// A size that Linux gives of this process, in bytes.
fn status(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// The machine, as far as it tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Operating system and processor family.
    pub system: String,
    /// Name of the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processor: Option<String>,
    /// Threads that compute.
    pub threads: usize,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpu.lines().find_map(|l| l.strip_prefix("model name"));
        let name = name.and_then(|l| l.split_once(':'));
        Self {
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processor: name.map(|(_, name)| name.trim().to_owned()),
            threads: rayon::current_num_threads(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_between_the_samples() {
        let timing = Timing::from_samples(&[5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!((timing.runs, timing.median), (5, 3.0));
        assert_eq!((timing.low, timing.high), (2.0, 4.0));
        assert_eq!((timing.runs, timing.least), (5, 1.0));
        assert!((Timing::from_samples(&[7.0]).high - 7.0).abs() < 1e-12);
        assert!((Timing::from_samples(&[1.0, 2.0]).median - 1.5).abs() < 1e-12);
        assert_eq!(Timing::from_samples(&[]), Timing::default());
    }

    #[test]
    fn work_is_repeated_in_turn_until_the_effort_is_spent() {
        let order = std::cell::RefCell::new(String::new());
        let effort = Effort {
            warm_up: 1,
            min_runs: 3,
            max_runs: 3,
            seconds: 0.0,
        };
        let a = &mut || -> Result<()> {
            order.borrow_mut().push('a');
            Ok(())
        };
        let b = &mut || -> Result<()> {
            order.borrow_mut().push('b');
            Ok(())
        };
        let timings = measure(&Device::Cpu, effort, &mut [a, b]).unwrap();
        assert_eq!(order.into_inner(), "abababab");
        assert!(timings.iter().all(|t| t.runs == 3));
    }

    /// In a process of its own: what other tests hold and give back meanwhile counts as this process's memory, too.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_is_that_since_the_start() {
        const ALONE: &str = "FASTFLUX_TEST_ALONE";
        if std::env::var_os(ALONE).is_some() {
            return peaks_alone();
        }
        let module = module_path!();
        let module = module.split_once("::").map_or(module, |(_, rest)| rest);
        let name = format!("{module}::the_peak_is_that_since_the_start");
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name.as_str(), "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && text.contains("1 passed"), "{text}");
    }

    #[cfg(target_os = "linux")]
    fn peaks_alone() {
        let held = |megabytes: usize| {
            let block = vec![1u8; megabytes << 20];
            assert!(std::hint::black_box(&block).iter().all(|b| *b == 1));
        };
        held(256); // before the start: does not count
        let watch = MemoryWatch::start(None);
        let Some(before) = watch.host() else {
            return; // the system does not say
        };
        held(64);
        let after = watch.host().unwrap();
        let grown = after.saturating_sub(before) >> 20;
        assert!((48..128).contains(&grown), "{before} {after}");
        assert_eq!(watch.device(), None);
    }

    #[test]
    fn the_least_free_memory_of_a_device_is_what_counts() {
        let mut watch = MemoryWatch::start(Some(100));
        watch.sample(Some(40));
        watch.sample(Some(70));
        assert_eq!(watch.device(), Some(60));
    }
}
