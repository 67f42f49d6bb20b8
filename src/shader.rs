//! Composes a kernel's WGSL: parts, one after the other, behind a header of constants. There is no
//! preprocessor; an option that is absent is another part (a branch would still count its binding).

use crate::dtype::Dtype;
use crate::error::Operand;
use crate::kernel::{Blueprint, Io, Kernel, Slot};

macro_rules! part {
    ($name:literal) => {
        include_str!(concat!("../shaders/", $name, ".wgsl"))
    };
}

/// The WGSL of a blueprint.
pub(crate) fn compose(blueprint: &Blueprint) -> String {
    let b = blueprint;
    let mut out = String::new();
    let ios = [b.q, b.k, b.v, b.o, b.bias];
    if ios.iter().flatten().any(|io| io.native) {
        out.push_str("enable f16;\n");
    }
    out.push_str(&format!("// {}, composed from shaders/\n", b.kernel.name()));
    for (name, value) in constants(b) {
        out.push_str(&format!("const {name}: u32 = {value}u;\n"));
    }
    if b.kernel.is_scores() {
        out.push_str(&format!("const SOFTCAP: bool = {};\n", b.softcap));
    }
    let mut add = |text: &str| {
        out.push('\n');
        out.push_str(text);
    };
    add(part!("params"));
    add(part!("common"));
    if ios.iter().flatten().any(|io| io.dtype != Dtype::F32 && !io.native) {
        add(part!("io/convert"));
    }
    for (io, operand, width) in
        [(b.q, Operand::Q, "query_dim"), (b.k, Operand::K, "head_dim"), (b.v, Operand::V, "head_dim_v")]
    {
        if let Some(io) = io {
            add(&load(io, operand));
            add(&named(part!("io/row"), operand));
            if !io.vec4 {
                add(&named(part!("io/load4_by_element"), operand).replace("WIDTH", width));
            }
        }
    }
    if b.kernel == Kernel::Project {
        add(part!("io/query_plain"));
        add(part!("kernel/project"));
        return out;
    }
    add(part!("mask"));
    optional(&mut add, b.kv_lens, Operand::KvLens, [part!("io/kv_lens"), part!("io/kv_lens_none")]);
    if b.kernel.is_scores() {
        if b.projected {
            let number = Slot::Projected.number().to_string();
            add(&part!("io/query_projected").replace("BINDING", &number));
        } else {
            add(part!("io/query_plain"));
        }
        if let Some(io) = b.bias {
            add(&load(io, Operand::Bias));
            add(&named(part!("io/row"), Operand::Bias));
            add(part!("io/bias"));
        } else {
            add(part!("io/bias_none"));
        }
        if b.mask {
            add(&named(part!("io/row"), Operand::Mask));
        }
        optional(&mut add, b.mask, Operand::Mask, [part!("io/mask"), part!("io/mask_none")]);
        optional(&mut add, b.alibi, Operand::AlibiSlopes, [part!("io/alibi"), part!("io/alibi_none")]);
        add(part!("score"));
    } else {
        add(part!("values_range"));
    }
    if b.kernel == Kernel::SoftmaxRow {
        optional(&mut add, b.sinks, Operand::Sinks, [part!("io/sink"), part!("io/sink_none")]);
        optional(&mut add, b.lse, Operand::Lse, [part!("io/lse"), part!("io/lse_none")]);
    }
    if let Some(io) = b.o {
        add(&named(part!("io/row"), Operand::O));
        add(&store(io));
        add(if b.parts { part!("io/finish_part") } else { part!("io/finish_whole") });
        add(part!("careful"));
    }
    add(match b.kernel {
        Kernel::Project => unreachable!("composed above"),
        Kernel::ScoresTile => part!("kernel/scores_tile"),
        Kernel::ScoresDirect => part!("kernel/scores_direct"),
        Kernel::SoftmaxRow => part!("kernel/softmax_row"),
        Kernel::ValuesTile => part!("kernel/values_tile"),
        Kernel::ValuesDirect => part!("kernel/values_direct"),
        Kernel::Weights => part!("kernel/weights"),
    });
    out
}

/// The kernel's own compile-time sizes.
fn constants(b: &Blueprint) -> Vec<(&'static str, u32)> {
    let t = &b.tiles;
    let values = [("VALUES_ROWS", t.values_rows), ("VALUES_STEP", t.values_step)];
    let own: &[(&str, u32)] = match b.kernel {
        Kernel::Project => &[("LANES", b.threads())],
        Kernel::ScoresTile => &[("SIDE", t.scores_lanes), ("STEP", t.scores_step)],
        Kernel::ScoresDirect => {
            &[("LANES", t.scores_lanes), ("ROWS", t.scores_rows), ("KEYS", t.scores_keys / t.scores_lanes)]
        }
        Kernel::SoftmaxRow => &[("LANES", t.softmax_lanes), ("GROUP_ROWS", t.softmax_rows)],
        Kernel::ValuesTile => &[("SIDE", t.values_lanes)],
        Kernel::ValuesDirect => &[("LANES", t.values_lanes)],
        Kernel::Weights => &[("LANES", b.threads())],
    };
    let mut all = own.to_vec();
    if b.kernel != Kernel::Project && !b.kernel.is_scores() {
        all.extend(values);
    }
    all
}

fn named(text: &str, operand: Operand) -> String {
    text.replace("OPERAND", &operand.to_string())
        .replace("BINDING", &Slot::Operand(operand).number().to_string())
}

fn optional(add: &mut impl FnMut(&str), present: bool, operand: Operand, [with, without]: [&str; 2]) {
    if present { add(&named(with, operand)) } else { add(without) }
}

fn load(io: Io, operand: Operand) -> String {
    let text = match (io.dtype, io.native, io.vec4) {
        (Dtype::F32, _, true) => part!("io/load_f32_vec4"),
        (Dtype::F32, _, false) => part!("io/load_f32_any"),
        (_, true, true) => part!("io/load_f16_vec4"),
        (_, true, false) => part!("io/load_f16_any"),
        (_, false, true) => part!("io/load_pair_vec4"),
        (_, false, false) => part!("io/load_pair_any"),
    };
    named(text, operand).replace("DTYPE", &io.dtype.to_string())
}

fn store(io: Io) -> String {
    let text = match (io.dtype, io.native, io.vec4) {
        (Dtype::F32, _, true) => part!("io/store_f32_vec4"),
        (Dtype::F32, _, false) => part!("io/store_f32_any"),
        (_, true, true) => part!("io/store_f16_vec4"),
        (_, true, false) => part!("io/store_f16_any"),
        (_, false, true) => part!("io/store_pair_vec4"),
        (_, false, false) => part!("io/store_pair_any"),
    };
    let text = named(text, Operand::O).replace("DTYPE", &io.dtype.to_string());
    if io.vec4 { text } else { format!("{text}\n{}", part!("io/store4_by_element")) }
}
