//! Flash attention on NVIDIA GPUs: which crate's kernels compute it, if one is built in. They are other people's, and
//! are compared with the reference implementation like our own before they are used.

use std::sync::LazyLock;

use candle::{DType, Device, Result, Tensor};

/// The size of a head that they are used for: FLUX's, in every family.
pub(super) const HEAD: usize = 128;

/// Whose kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flash {
    /// candle-flash-attn-v3, for compute capability 9.0 alone
    Three,
    /// candle-flash-attn, for 8.0 and later
    Two,
}

impl Flash {
    /// Those of this build that run on `device`, the faster ones first.
    pub(super) fn all(device: &Device) -> Vec<Self> {
        let Device::Cuda(device) = device else {
            return vec![];
        };
        let stream = device.cuda_stream();
        let capability = stream.context().compute_capability().unwrap_or_default();
        let each = [
            (
                Self::Three,
                cfg!(feature = "flash-attn-v3") && capability == (9, 0),
            ),
            (
                Self::Two,
                cfg!(feature = "flash-attn") && capability >= (8, 0),
            ),
        ];
        each.into_iter()
            .filter(|(flash, runs)| *runs && wanted(flash.kernel()))
            .map(|(flash, _)| flash)
            .collect()
    }

    /// The name it goes by if kernels are refused, and in `FASTFLUX_ATTENTION`.
    pub(super) fn kernel(self) -> &'static str {
        match self {
            Self::Three => "flash3",
            Self::Two => "flash2",
        }
    }

    /// `softmax(q·kᵀ · scale)·v` of (batch, heads, tokens, [`HEAD`]) in bf16, to (batch, tokens, heads · [`HEAD`]).
    #[cfg_attr(
        not(any(feature = "flash-attn", feature = "flash-attn-v3")),
        expect(unused_variables, reason = "none is built in")
    )]
    pub(super) fn attention(
        self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scale: f32,
    ) -> Result<Tensor> {
        // the kernels want (batch, tokens, heads, head size) and take any strides
        let [q, k, v] = [q, k, v].map(|x| x.transpose(1, 2));
        let (q, k, v) = (q?, k?, v?);
        let attended: Result<Tensor> = match self {
            #[cfg(feature = "flash-attn-v3")]
            Self::Three => candle_flash_attn_v3::flash_attn(&q, &k, &v, scale, false, false),
            #[cfg(feature = "flash-attn")]
            Self::Two => candle_flash_attn::flash_attn(&q, &k, &v, scale, false),
            #[allow(unreachable_patterns, reason = "if both are built in")]
            _ => Err(candle::Error::Msg(format!(
                "{} is not built in",
                self.kernel()
            ))),
        };
        attended?.flatten_from(2)
    }
}

/// Whether `FASTFLUX_ATTENTION` allows kernels of this name; without it all are. `plain` allows none. For measurements.
fn wanted(kernel: &str) -> bool {
    static CHOICE: LazyLock<Option<String>> =
        LazyLock::new(|| std::env::var("FASTFLUX_ATTENTION").ok());
    CHOICE.as_ref().is_none_or(|choice| choice == kernel)
}

/// Whether the kernels take heads of this size in this format.
pub(super) fn fits(dtype: DType, head: usize) -> bool {
    dtype == DType::BF16 && head == HEAD
}
