//! What kernels bind, and under which numbers.

use crate::error::Operand;

/// What is bound, always under the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Params,
    Operand(Operand),
    Scores,
    InverseSums,
    Projected,
    KeyTerms,
    /// Keys, and values, as rows of f32.
    UnpackedK,
    UnpackedV,
    Carried,
    Bundle,
    MaskMap,
    Lengths,
    Launch,
    Gathered,
    LayerProjected,
    LayerTurned,
    LayerAttended,
}

impl Slot {
    pub(crate) const fn number(self) -> u32 {
        match self {
            Self::Params => 0,
            Self::Operand(operand) => match operand {
                Operand::Q => 1,
                Operand::K => 2,
                Operand::V => 3,
                Operand::O => 4,
                Operand::Bias => 5,
                Operand::Mask => 6,
                Operand::KvLens => 7,
                Operand::AlibiSlopes => 8,
                Operand::Sinks => 9,
                Operand::Lse => 10,
                Operand::W => 12,
                Operand::Weights => 13,
                Operand::BlockTable => 19,
                Operand::CuSeqlensQ => 20,
                Operand::CuSeqlensK => 21,
                Operand::Status => 22,
                Operand::KNew => 24,
                Operand::VNew => 25,
                Operand::QNew => 26,
                Operand::Rope => 27,
                Operand::QGain => 29,
                Operand::KGain => 30,
                // A linear map's, whose bindings have numbers of their own.
                Operand::X => 31,
                Operand::Y => 32,
                Operand::Wq => 36,
                Operand::Wk => 37,
                Operand::ScoreV => 38,
                Operand::Positions => 40,
                Operand::Dout => 41,
                Operand::Dq | Operand::Dk | Operand::Dv | Operand::Dbias | Operand::Dsinks => 42,
            },
            Self::Scores => 11,
            Self::InverseSums => 14,
            Self::Projected => 15,
            Self::Carried => 16,
            Self::Bundle => 17,
            Self::MaskMap => 18,
            Self::Lengths => 23,
            Self::Launch => 28,
            Self::LayerProjected => 33,
            Self::LayerTurned => 34,
            Self::LayerAttended => 35,
            Self::KeyTerms => 39,
            Self::Gathered => 43,
            Self::UnpackedK => 44,
            Self::UnpackedV => 45,
        }
    }
}

/// A binding of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Binding {
    pub(crate) slot: Slot,
    pub(crate) writes: bool,
}
