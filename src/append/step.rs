//! One dispatch of an append, as it is compiled.

use crate::append::QkNorm;
use crate::blueprint::{Io, Keys};
use crate::caps::Caps;
use crate::error::{Error, Operand, Result};
use crate::rope::{Pairing, Rope};
use crate::slot::Slot;

/// The binding of the table of angles.
pub(crate) const APPEND_ROPE: u32 = Slot::Operand(Operand::Rope).number();

/// RoPE as it is compiled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Turn {
    pub(crate) width: u32,
    pub(crate) interleaved: bool,
}

/// A norm as it is compiled in; RMS norms have gains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Norm {
    pub(crate) rms: bool,
    pub(crate) gain: Option<Operand>,
}

impl Turn {
    pub(crate) fn of(rope: Rope) -> Self {
        Self { width: rope.width as u32, interleaved: rope.pairing == Pairing::Interleaved }
    }
}

impl Norm {
    pub(crate) fn of(norm: QkNorm, gain: Operand) -> Self {
        let rms = matches!(norm, QkNorm::Rms { .. });
        Self { rms, gain: rms.then_some(gain) }
    }
}

/// Where rows stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stand {
    /// At the end of an entry's keys, whose number `kv_lens` has.
    Tail,
    /// Row t at position t, behind as many as the uniform block says.
    Rows,
    /// Where the caller says.
    Given,
}

/// One dispatch of an append, as it is compiled: it moves one tensor, or advances the lengths (then it has
/// neither `from` nor `to`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct AppendStep {
    pub(crate) from: Option<Io>,
    pub(crate) to: Option<Io>,
    /// Rows do not go to a cache, but to those of another tensor.
    pub(crate) is_query: bool,
    pub(crate) stand: Stand,
    pub(crate) width: u32,
    pub(crate) keys: Keys,
    pub(crate) ragged: bool,
    pub(crate) norm: Option<Norm>,
    pub(crate) rope: Option<Turn>,
    pub(crate) status: bool,
}

/// What a binding of a step holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    From,
    To,
    Operand(Operand),
}

impl AppendStep {
    pub(crate) fn name(&self) -> &'static str {
        if self.from.is_some() { "append" } else { "advance" }
    }

    /// Threads of a workgroup: a quad or two each of rows as wide as models have.
    pub(crate) fn lanes(&self) -> u32 {
        if self.from.is_some() { 32 } else { 64 }
    }

    /// Whether a device can run it.
    pub(crate) fn fits(&self, caps: &Caps) -> Result<()> {
        let bytes = if self.norm.is_some() { 8 } else { 4 } * u64::from(self.width);
        for (what, need, got) in [
            ("bytes of workgroup memory", bytes, u64::from(caps.max_workgroup_bytes)),
            ("storage buffers", self.bindings().count() as u64, u64::from(caps.max_storage_buffers)),
        ] {
            if need > got {
                let why = format!("it needs {need} {what}, the device has {got}");
                return Err(Error::KernelUnfit { kernel: self.name().into(), why });
            }
        }
        Ok(())
    }

    /// Number, content and whether it is written, of every storage binding.
    pub(crate) fn bindings(&self) -> impl Iterator<Item = (u32, Holds, bool)> {
        let moves = self.from.is_some();
        let own = |operand: Operand| (Slot::Operand(operand).number(), Holds::Operand(operand));
        let number = |operand: Operand| Slot::Operand(operand).number();
        [
            (moves, (number(Operand::Q), Holds::From), false),
            (moves, (number(Operand::K), Holds::To), true),
            (self.stand == Stand::Tail, own(Operand::KvLens), !moves),
            (self.stand == Stand::Given, own(Operand::Positions), false),
            (matches!(self.keys, Keys::Paged(_)), own(Operand::BlockTable), false),
            (self.ragged, own(Operand::CuSeqlensQ), false),
            (self.status, own(Operand::Status), true),
            (self.rope.is_some(), own(Operand::Rope), false),
        ]
        .into_iter()
        .chain(self.norm.and_then(|norm| norm.gain).map(|gain| (true, own(gain), false)))
        .filter_map(|(present, (number, holds), writes)| present.then_some((number, holds, writes)))
    }
}
