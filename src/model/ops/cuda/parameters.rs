//! What each kernel is called with: the Rust side of the structs of the `.cu` files, under the same names.
#![expect(
    unsafe_code,
    reason = "a kernel reads its parameters as they lie in memory"
)]

use std::marker::PhantomData;

use candle::Tensor;
use candle::cuda_backend::cudarc::driver::DeviceRepr;

/// A tensor (batch, tokens, width) or (batch, width) or (width,) as `kernels.cu` reads it; strides in numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowView<'a> {
    pub(super) data: u64,
    pub(super) batch: i64,
    pub(super) token: i64,
    pub(super) tensor: PhantomData<&'a Tensor>,
}

/// Declares the parameters of a kernel, as `kernels.cu` does under the same names.
macro_rules! parameters {
    ($($kernel:literal $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name<'a> {
            $(pub(super) $field: $type),*
        }

        // SAFETY: `repr(C)`, and the kernel takes one parameter of these fields
        unsafe impl DeviceRepr for $name<'_> {}

        impl Parameters for $name<'_> {
            const KERNEL: &'static str = $kernel;
        }
    )*};
}

/// What a kernel is called with.
pub(super) trait Parameters: DeviceRepr {
    /// The kernel's name without the number format.
    const KERNEL: &'static str;
}

parameters! {
    "norm_modulate" NormModulate {
        x: RowView<'a>,
        shift: RowView<'a>,
        scale: RowView<'a>,
        out: u64,
        width: i32,
        whole: i32,
        eps: f32,
    }
    "softmax" Softmax {
        x: RowView<'a>,
        out: u64,
        width: i32,
        whole: i32,
    }
    "gated_residual" GatedResidual {
        x: RowView<'a>,
        y: RowView<'a>,
        bias: RowView<'a>,
        gate: RowView<'a>,
        out: u64,
        tokens: i32,
        width: i32,
        first: i32,
        total: i32,
        whole: i32,
    }
    "heads" Heads {
        qkv: RowView<'a>,
        bias: RowView<'a>,
        query: RowView<'a>,
        key: RowView<'a>,
        cos: u64,
        sin: u64,
        out: u64,
        number: i32,
        size: i32,
        first: i32,
        total: i32,
        whole: i32,
        eps: f32,
    }
    "gelu" Gelu {
        x: RowView<'a>,
        bias: RowView<'a>,
        prefix: RowView<'a>,
        out: u64,
        tokens: i32,
        front: i32,
        width: i32,
        whole: i32,
    }
    "token_sums" TokenSums {
        x: RowView<'a>,
        y: RowView<'a>,
        out: u64,
        tokens: i32,
        width: i32,
        whole: i32,
    }
    "column_sums" ColumnSums {
        x: RowView<'a>,
        y: RowView<'a>,
        out: u64,
        tokens: i32,
        width: i32,
        whole: i32,
    }
    "add_products" AddProducts {
        products: RowView<'a>,
        columns: RowView<'a>,
        gram: u64,
        cross: u64,
        gram_out: u64,
        cross_out: u64,
        tokens: i32,
        width: i32,
    }
    "attention_backward" AttentionBackward {
        q: u64,
        k: u64,
        v: u64,
        attended: RowView<'a>,
        grad: RowView<'a>,
        out: u64,
        sums: u64,
        tokens: i32,
        padded: i32,
        scale: f32,
    }
    "swiglu" Swiglu {
        x: RowView<'a>,
        prefix: RowView<'a>,
        out: u64,
        tokens: i32,
        front: i32,
        width: i32,
        whole: i32,
    }
    "gelu_backward" GeluBackward {
        x: RowView<'a>,
        bias: RowView<'a>,
        grad: RowView<'a>,
        out: u64,
        tokens: i32,
        width: i32,
        stride: i32,
        whole: i32,
    }
    "swiglu_backward" SwigluBackward {
        x: RowView<'a>,
        grad: RowView<'a>,
        out: u64,
        tokens: i32,
        width: i32,
        whole: i32,
    }
    "norm_backward" NormBackward {
        x: RowView<'a>,
        scale: RowView<'a>,
        grad: RowView<'a>,
        out: u64,
        along: u64,
        width: i32,
        whole: i32,
        eps: f32,
    }
    "heads_backward" HeadsBackward {
        qkv: RowView<'a>,
        bias: RowView<'a>,
        query: RowView<'a>,
        key: RowView<'a>,
        cos: u64,
        sin: u64,
        grad: u64,
        out: u64,
        number: i32,
        size: i32,
        first: i32,
        total: i32,
        stride: i32,
        whole: i32,
        eps: f32,
    }
    "residual_backward" ResidualBackward {
        y: RowView<'a>,
        bias: RowView<'a>,
        gate: RowView<'a>,
        grad: RowView<'a>,
        out: u64,
        sums: u64,
        tokens: i32,
        width: i32,
        whole: i32,
    }
    "weighted_sum" WeightedSum {
        x: RowView<'a>,
        y: RowView<'a>,
        out: u64,
        len: i64,
        a: f32,
        b: f32,
        whole: i32,
    }
}
