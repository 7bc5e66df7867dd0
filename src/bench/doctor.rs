//! What this build can do and what the machine has: the first thing to look at if something is slow or missing.

use std::{path::Path, process::Command, sync::OnceLock};

use serde::Serialize;

use super::timing::Machine;
use crate::{
    checkpoint::record,
    device::{self, DTypeChoice, DeviceChoice, Runtime},
    files::{self, Cache},
    model::ops,
    ui,
};

/// The build, the machine, and what of it is free.
#[derive(Clone, Debug, Serialize)]
pub struct DoctorReport {
    /// Program and version.
    pub tool: String,
    /// Features of this build.
    pub features: Vec<&'static str>,
    /// The machine.
    pub machine: Machine,
    /// Instruction sets of the CPU that kernels are built for, and whether it has them.
    pub instructions: Vec<(&'static str, bool)>,
    /// The device and number format that commands take without flags.
    pub runtime: Option<String>,
    /// What is wrong with the GPU or its kernels.
    pub trouble: Option<String>,
    /// GPUs with driver and memory, as `nvidia-smi` lists them.
    pub gpus: Vec<String>,
    /// Free memory of the device, in bytes.
    pub free_memory: Option<u64>,
    /// Free bytes on the disk of the current folder.
    pub free_disk: Option<u64>,
    /// Where files of the hub are kept; `None` in a build without hub.
    pub cache: Option<Cache>,
}

/// What `--version` prints: version and commit, features, and the CPU kernels that this machine runs.
pub fn long_version() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        // releases set it
        let commit = option_env!("FASTFLUX_COMMIT").map_or_else(String::new, |c| format!(" ({c})"));
        let there = instructions().into_iter().filter(|(_, there)| *there);
        let kernels: Vec<&str> = there.map(|(name, _)| name).collect();
        format!(
            "{}{commit}\nfeatures: {}\nkernels: {}",
            env!("CARGO_PKG_VERSION"),
            listed(&features()),
            listed(&kernels)
        )
    })
}

fn listed(all: &[&str]) -> String {
    match all {
        [] => "none".to_owned(),
        all => all.join(", "),
    }
}

impl DoctorReport {
    /// Looks at this build and machine.
    pub fn new() -> Self {
        let runtime = Runtime::resolve(DeviceChoice::Auto, DTypeChoice::Auto);
        let unused = device::unused_gpu().map(str::to_owned);
        let refused = |runtime: &Runtime| ops::trouble(&runtime.device);
        let (runtime, failed) = match runtime {
            Ok(runtime) => (Some(runtime), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Self {
            tool: record::software(),
            features: features(),
            machine: Machine::this(),
            instructions: instructions(),
            trouble: failed.or(unused).or(runtime.as_ref().and_then(refused)),
            gpus: gpus(),
            free_memory: runtime.as_ref().and_then(Runtime::free_memory),
            free_disk: files::free_space(Path::new(".")),
            cache: Cache::from_env(),
            runtime: runtime.map(|runtime| runtime.to_string()),
        }
    }

    /// A line for each.
    pub fn text(&self) -> String {
        let size = |bytes: Option<u64>| {
            bytes.map_or_else(|| "unknown".to_owned(), |bytes| ui::bytes(bytes as f64))
        };
        let has: Vec<&str> = self
            .instructions
            .iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| *name)
            .collect();
        let processor = self.machine.processor.as_deref().unwrap_or("unknown");
        let mut lines = vec![
            format!("version    {}", self.tool),
            format!("features   {}", listed(&self.features)),
            format!("system     {}", self.machine.system),
            format!(
                "processor  {processor}, {}",
                ui::counted(self.machine.threads, "thread")
            ),
            format!("kernels    {}", listed(&has)),
            format!(
                "device     {}",
                self.runtime.as_deref().unwrap_or("none can be used")
            ),
            format!("memory     {} free", size(self.free_memory)),
            format!("disk       {} free in this folder", size(self.free_disk)),
        ];
        lines.extend(self.gpus.iter().map(|gpu| format!("GPU        {gpu}")));
        match &self.cache {
            None => lines.push("hub        not in this build".to_owned()),
            Some(cache) => lines.push(format!(
                "hub        {}, {}, cache {} ({} free)",
                if cache.offline { "offline" } else { "online" },
                if cache.has_token {
                    "with a token"
                } else {
                    "without a token (HF_TOKEN)"
                },
                cache.folder,
                size(cache.free)
            )),
        }
        lines.extend(self.trouble.iter().map(|why| format!("trouble    {why}")));
        lines.join("\n")
    }
}

impl Default for DoctorReport {
    fn default() -> Self {
        Self::new()
    }
}

fn features() -> Vec<&'static str> {
    [
        ("hub", cfg!(feature = "hub")),
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("flash-attn", cfg!(feature = "flash-attn")),
        ("flash-attn-v3", cfg!(feature = "flash-attn-v3")),
        ("metal", cfg!(feature = "metal")),
        ("accelerate", cfg!(feature = "accelerate")),
        ("mkl", cfg!(feature = "mkl")),
    ]
    .into_iter()
    .filter_map(|(name, there)| there.then_some(name))
    .collect()
}

fn instructions() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    return vec![
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
        ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
        (
            "AVX-512 BF16",
            std::arch::is_x86_feature_detected!("avx512bf16"),
        ),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// GPUs by the driver's own tool; empty if there is none.
fn gpus() -> Vec<String> {
    let fields = "--query-gpu=name,driver_version,memory.total,memory.free";
    let listed = Command::new("nvidia-smi")
        .args([fields, "--format=csv,noheader"])
        .output();
    let listed = listed.ok().filter(|out| out.status.success());
    let text = listed.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    let lines = text.unwrap_or_default();
    lines.lines().map(|line| line.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_a_line_for_everything() {
        let report = DoctorReport::new();
        assert!(report.runtime.is_some() && report.tool.starts_with("fastflux "));
        let text = report.text();
        for name in [
            "version",
            "features",
            "processor",
            "device",
            "memory",
            "disk",
            "hub",
        ] {
            assert!(
                text.lines().any(|line| line.starts_with(name)),
                "{name}: {text}"
            );
        }
    }
}
