//! Composes a kernel's WGSL: parts, one after the other, behind a header of constants. There is no
//! preprocessor; an option that is absent is another part (a branch would still count its binding).

use crate::append::{APPEND_ROPE, AppendStep, Stand};
use crate::blueprint::{Blueprint, Io, Keys, ROW_BLOCK};
use crate::dtype::Dtype;
use crate::error::Operand;
use crate::kernel::{ELEMENT_LANES, Kernel};
use crate::problem::KeyTerms;
use crate::quant;
use crate::slot::Slot;
use crate::unroll::unroll;

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
    let matrix = b.kernel == Kernel::FusedMatrix;
    if matrix || ios.iter().flatten().any(|io| io.native) {
        out.push_str("enable f16;\n");
    }
    if matrix {
        out.push_str("enable wgpu_cooperative_matrix;\n");
    }
    out.push_str(&format!("// {}, composed from shaders/\n", b.kernel.name()));
    for (name, value) in constants(b) {
        out.push_str(&format!("const {name}: u32 = {value}u;\n"));
    }
    if b.kernel.is_scores() || b.kernel.is_fused() {
        out.push_str(&format!("const SOFTCAP: bool = {};\n", b.softcap));
    }
    if b.kernel.is_fused_tile() {
        out.push_str(&format!("const BOTH: bool = {};\n", b.tiles.fused.both));
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
            let eights = b.kernel == Kernel::FusedMatrix && b.tiles.matrix.eights;
            let unpacked = match operand {
                Operand::K if b.unpacked() => Some(Slot::UnpackedK),
                Operand::V if b.unpacked() => Some(Slot::UnpackedV),
                _ => None,
            };
            add(&match (operand, unpacked) {
                (_, Some(slot)) => {
                    named(&load_part(io).replace("BINDING", &slot.number().to_string()), operand)
                }
                (Operand::K | Operand::V, _) if eights => named(part!("io/load_f16_eight"), operand),
                _ => load(io, operand).replace("WIDTH", width),
            });
            if operand == Operand::Q {
                add(&row(operand, b.ragged_q));
            } else if unpacked.is_some() {
                add(&named(part!("io/key_unpacked"), operand).replace("WIDTH", width));
                add(&named(part!("io/key_row"), operand));
            } else {
                keys(&mut add, operand, b.keys);
            }
            if !io.vec4 && io.dtype.is_float() {
                // An unrolled kernel knows at compile time which elements there are.
                let known = [("head_dim", b.tiles.row.width), ("head_dim_v", b.tiles.row.width_v)];
                let known = known.iter().find(|(name, size)| *name == width && *size > 0);
                let text = named(part!("io/load4_by_element"), operand);
                add(&match known {
                    Some((_, size)) => text.replace("params.WIDTH", &format!("{size}u")),
                    None => text.replace("WIDTH", width),
                });
            }
            if b.kernel == Kernel::FusedRow && operand != Operand::Q {
                let row = b.tiles.row;
                let v = operand == Operand::V;
                let quads = if v { row.width_v } else { row.width }.div_ceil(4);
                let whole = unpacked.is_some() && (row.keys * quads).is_power_of_two();
                let block = match unpacked {
                    Some(_) if whole => row.keys * quads,
                    Some(_) => 1 << quads.trailing_zeros(),
                    None if b.in_blocks[usize::from(v)] => ROW_BLOCK as u32 / 4,
                    None => 1,
                };
                let text = match io.vec4 {
                    true if whole => part!("io/quad_unpacked"),
                    true => part!("io/quad_vec4"),
                    false => part!("io/quad_any"),
                };
                let text = text.replace("MASK", &format!("{:#010x}u", 0x0400_0000 - block));
                add(&named(&text, operand).replace("ROW_QUADS", if v { "QUADS_V" } else { "QUADS" }));
            }
        }
    }
    lists(&mut add, b);
    if b.kernel == Kernel::Bundle {
        add(part!("kernel/bundle"));
        return out;
    }
    if b.kernel != Kernel::MaskMap && !b.kernel.is_of_keys() {
        add(if b.ragged_q { part!("io/queries_ragged") } else { part!("io/queries") });
    }
    if b.kernel.is_of_queries() {
        add(part!("io/query_plain"));
        match b.kernel {
            Kernel::NormalizeQ => {
                add(part!("norm"));
                add(part!("kernel/normalize_q"));
            }
            _ => {
                let (w, out) = match b.kernel {
                    Kernel::Project => (Operand::W, "head_dim"),
                    _ => (Operand::Wq, "hidden"),
                };
                let number = Slot::Projected.number().to_string();
                let to = part!("io/product_queries").replace("BINDING", &number);
                add(&product(b, &to, w, ["query_dim", out]));
            }
        }
        return out;
    }
    if b.kernel == Kernel::MaskMap {
        add(part!("mask_tiles"));
        mask(&mut add);
        add(part!("mask_map"));
        add(part!("kernel/mask_map"));
        return out;
    }
    key_lengths(&mut add, b.kv_lens || b.looked_after, b.keys == Keys::Ragged);
    if b.kernel == Kernel::Lengths {
        add(if matches!(b.keys, Keys::Paged(_)) { part!("io/blocks") } else { part!("io/blocks_none") });
        add(&if b.status {
            named(part!("io/status"), Operand::Status)
        } else {
            part!("io/status_none").to_string()
        });
        add(part!("kernel/lengths"));
        return out;
    }
    if b.kernel.is_of_keys() {
        add(part!("key_terms"));
        if b.kernel != Kernel::ProjectK {
            add(part!("io/own_key"));
        }
        if b.kernel.unpacks() {
            add(part!("io/unpacked_row"));
            let (operand, slot, width) = match b.kernel {
                Kernel::UnpackK => (Operand::K, Slot::UnpackedK, "head_dim"),
                _ => (Operand::V, Slot::UnpackedV, "head_dim_v"),
            };
            let text = part!("kernel/unpack").replace("BINDING", &slot.number().to_string());
            let text = text.replace("WIDTH", width);
            add(&unroll(&named(&text, operand), &constants(b)));
        } else if b.kernel == Kernel::KeyNorms {
            add(part!("norm"));
            add(part!("kernel/key_norms"));
        } else {
            let to = part!("io/product_keys").replace("BINDING", &Slot::KeyTerms.number().to_string());
            add(&product(b, &to, Operand::Wk, ["head_dim", "hidden"]));
        }
        return out;
    }
    if b.kernel == Kernel::Count {
        add(part!("kernel/count"));
        return out;
    }
    add(part!("mask_tiles"));
    add(part!("mask"));
    let fused = b.kernel.is_fused();
    if b.kernel.is_scores() || fused {
        if b.projected {
            let number = Slot::Projected.number().to_string();
            add(&part!("io/query_projected").replace("BINDING", &number));
        } else {
            add(part!("io/query_plain"));
        }
        after_products(&mut add, b.bias, b.mask, b.alibi);
        let terms = Slot::KeyTerms.number().to_string();
        if b.unpacked() || b.key_terms != KeyTerms::None {
            add(part!("key_terms"));
        }
        if b.unpacked() {
            add(part!("io/unpacked_row"));
        }
        match b.key_terms {
            KeyTerms::None | KeyTerms::Projected => add(part!("io/compared_dot")),
            KeyTerms::InverseNorms => add(&part!("io/compared_cosine").replace("BINDING", &terms)),
        }
        if b.key_terms == KeyTerms::Projected {
            add(&part!("io/key_projected").replace("BINDING", &terms));
            add(&named(part!("io/pair_additive"), Operand::ScoreV));
        } else if b.kernel.is_scores() {
            add(part!("io/pair_product"));
            add(if b.kernel == Kernel::ScoresTile { part!("io/pair_dot") } else { part!("io/pair_fma") });
        }
        add(part!("score"));
        if b.mapped {
            add(part!("mask_map"));
            add(&part!("io/mask_map").replace("BINDING", &Slot::MaskMap.number().to_string()));
        } else if fused {
            add(part!("io/mask_map_none"));
        }
    } else if b.kernel != Kernel::Merge {
        add(part!("values_range"));
    }
    let merges = b.kernel == Kernel::Merge;
    if b.kernel == Kernel::SoftmaxRow || fused || merges {
        add(if b.sinks { part!("io/sink") } else { part!("io/sink_none") });
        if b.lse {
            add(&named(part!("io/lse"), Operand::Lse));
        } else {
            add(part!("io/lse_none"));
        }
    }
    if let Some(io) = b.o {
        add(&row(Operand::O, b.ragged_q));
        add(&store(io, Operand::O, "head_dim_v"));
        match (fused, b.parts) {
            _ if merges => {}
            (false, false) => add(part!("io/finish_whole")),
            (false, true) => add(part!("io/finish_part")),
            (true, false) => add(part!("io/end_whole")),
            (true, true) => add(part!("io/end_part")),
        }
    }
    if merges && b.counted {
        add(&part!("io/splits_counted").replace("BINDING", &Slot::Launch.number().to_string()));
    } else if merges {
        add(part!("io/splits_all"));
    }
    if merges || b.split || (fused && b.parts) {
        add(part!("io/carried"));
    }
    if b.split {
        add(part!("io/end_split"));
    }
    if fused || merges {
        add(part!("online_softmax"));
    } else if b.o.is_some() {
        add(part!("careful"));
    }
    if fused {
        add(if b.packed { part!("io/rows_packed") } else { part!("io/rows") });
    }
    if b.kernel.is_fused_tile() {
        // (Browsers want `enable subgroups;` first, which naga refuses; wgpu offers none there.)
        let subgroup = b.tiles.fused.subgroup;
        add(if subgroup { part!("exchange/place_subgroup") } else { part!("exchange/place_workgroup") });
        add(if subgroup { part!("exchange/subgroup") } else { part!("exchange/workgroup") });
        add(if subgroup { part!("exchange/neighbours") } else { part!("exchange/pairs") });
    }
    add(match b.kernel {
        Kernel::Project
        | Kernel::NormalizeQ
        | Kernel::KeyNorms
        | Kernel::ProjectQ
        | Kernel::ProjectK
        | Kernel::UnpackK
        | Kernel::UnpackV
        | Kernel::Lengths
        | Kernel::Bundle
        | Kernel::MaskMap
        | Kernel::Count => {
            unreachable!("composed above")
        }
        Kernel::ScoresTile => part!("kernel/scores_tile"),
        Kernel::ScoresDirect => part!("kernel/scores_direct"),
        Kernel::SoftmaxRow => part!("kernel/softmax_row"),
        Kernel::ValuesTile => part!("kernel/values_tile"),
        Kernel::ValuesDirect => part!("kernel/values_direct"),
        Kernel::Weights => part!("kernel/weights"),
        Kernel::Merge => part!("kernel/merge"),
        Kernel::FusedTile | Kernel::FusedSubgroup => {
            let subgroup = b.tiles.fused.subgroup;
            // Before the kernel's workgroup memory, and behind it: vec4s first, so that nothing lies between for
            // alignment.
            let held = b.tiles.fused.held > 0;
            add(if held { part!("exchange/queries_held") } else { part!("exchange/queries_cached") });
            add(&unroll(&placed(part!("kernel/fused_tile"), subgroup), &constants(b)));
            add(if subgroup {
                part!("exchange/staged_subgroup")
            } else {
                part!("exchange/staged_workgroup")
            });
            return out;
        }
        Kernel::FusedMatrix => {
            add(part!("exchange/place_subgroup"));
            add(part!("exchange/subgroup"));
            let edge = b.tiles.matrix.edge;
            let scalars = b.tiles.matrix.scalars;
            for (name, of) in [("kv", "f16"), ("q", "f16"), ("s", "f32"), ("p", "f16")] {
                if name != "q" || !b.tiles.matrix.kept_q {
                    add(&cells(scalars, name, of));
                }
            }
            let text = unroll(&placed(part!("kernel/fused_matrix"), true), &constants(b));
            add(&text.replace("FRAGMENT", &format!("coop_mat{edge}x{edge}")));
            let eights = b.tiles.matrix.eights;
            add(&unroll(
                if eights { part!("exchange/stage_eights") } else { part!("exchange/stage_quads") },
                &constants(b),
            ));
            return out;
        }
        Kernel::FusedRow => {
            add(&unroll(part!("kernel/fused_row"), &constants(b)));
            return out;
        }
    });
    out
}

/// A kernel whose threads go by their place, which it is told by arguments of its own. (As a struct of built-in values
/// it is nothing that DirectX takes: naga 30 looks for those of subgroups among the arguments alone.)
pub(crate) fn placed(kernel: &str, subgroup: bool) -> String {
    let names: &[&str] = if subgroup {
        &["subgroup_id", "num_subgroups", "subgroup_invocation_id"]
    } else {
        &["local_invocation_index"]
    };
    let arguments: Vec<_> = names.iter().map(|name| format!("@builtin({name}) {name}: u32")).collect();
    kernel.replace("PLACE_ARGUMENTS", &arguments.join(",\n    ")).replace("PLACE_VALUES", &names.join(", "))
}

/// The WGSL of a step of an append.
pub(crate) fn compose_append(step: &AppendStep) -> String {
    let s = step;
    let mut out = String::new();
    if s.from.iter().chain(&s.to).any(|io| io.native) {
        out.push_str("enable f16;\n");
    }
    out.push_str(&format!("// {}, composed from shaders/\n", s.name()));
    let mut constant = |name: &str, value: String| out.push_str(&format!("const {name} = {value};\n"));
    constant("LANES", format!("{}u", s.lanes()));
    if let Keys::Paged(page) = s.keys {
        constant("PAGE", format!("{page}u"));
    }
    if let Keys::Ring(capacity) = s.keys {
        constant("RING", format!("{capacity}u"));
    }
    if s.from.is_some() {
        constant("WIDTH", format!("{}u", s.width));
        let (rope, interleaved) = s.rope.map_or((0, false), |rope| (rope.width, rope.interleaved));
        constant("ROPE", format!("{rope}u"));
        constant("INTERLEAVED", interleaved.to_string());
        if let Some(norm) = s.norm {
            constant("RMS", norm.rms.to_string());
        }
    }
    if let Some((io, (group, bits))) = s.to.and_then(|io| Some((io, quant::format(io.dtype)?))) {
        constant("GROUP", format!("{}u", group.min(s.width as usize)));
        constant("BITS", format!("{bits}u"));
        constant("FITS", format!("{}u", quant::fits(io.dtype)));
    }
    let mut add = |text: &str| {
        out.push('\n');
        out.push_str(text);
    };
    add(part!("params"));
    add(part!("common"));
    let list = |operand: Operand| named(part!("io/list"), operand);
    if s.ragged {
        add(&list(Operand::CuSeqlensQ));
    }
    add(if s.ragged { part!("io/queries_ragged") } else { part!("io/queries") });
    let (Some(from), Some(to)) = (s.from, s.to) else {
        add(part!("kernel/advance"));
        return out;
    };
    if [from, to].iter().any(|io| matches!(io.dtype, Dtype::F16 | Dtype::Bf16) && !io.native) {
        add(part!("io/convert"));
    }
    match s.stand {
        Stand::Tail => {
            add(&list(Operand::KvLens));
            add(part!("io/positions_tail"));
        }
        Stand::Rows => add(part!("io/positions_rows")),
        Stand::Given => {
            add(&list(Operand::Positions));
            add(part!("io/positions_given"));
        }
    }
    add(&row(Operand::Q, s.ragged));
    add(&load(from, Operand::Q));
    match s.norm {
        Some(norm) => {
            add(&match norm.gain {
                Some(operand) => named(part!("io/gain"), operand),
                None => part!("io/gain_none").into(),
            });
            add(part!("io/norm"));
        }
        None => add(part!("io/norm_none")),
    }
    match s.rope {
        Some(_) => add(&part!("io/angle").replace("BINDING", &APPEND_ROPE.to_string())),
        None => add(part!("io/angle_none")),
    }
    add(part!("io/status_bits"));
    add(&if s.status { named(part!("io/status"), Operand::Status) } else { part!("io/status_none").into() });
    if s.is_query {
        add(&row(Operand::K, s.ragged));
        add(part!("io/place_query"));
    } else {
        if let Keys::Paged(_) = s.keys {
            add(&list(Operand::BlockTable));
        }
        keys(&mut add, Operand::K, s.keys);
        add(part!("io/place_key"));
        let paged = matches!(s.keys, Keys::Paged(_));
        add(if paged { part!("io/has_place_paged") } else { part!("io/has_place") });
    }
    if to.dtype.is_float() {
        add(&store(to, Operand::K, "head_dim"));
        add(part!("io/store_row"));
    } else {
        add(&named(part!("io/store_row_codes"), Operand::K));
    }
    add(part!("kernel/append"));
    out
}

/// How rows of k or v are found.
fn keys(add: &mut impl FnMut(&str), operand: Operand, keys: Keys) {
    let text = match keys {
        Keys::Contiguous => part!("io/key"),
        Keys::Ragged => part!("io/key_ragged"),
        Keys::Ring(_) => part!("io/key_ring"),
        Keys::Paged(_) => part!("io/key_paged"),
    };
    add(&named(text, operand));
    add(&named(part!("io/key_row"), operand));
}

/// How many keys an entry has: by a list, by where ragged ones begin, or as many as there are.
pub(crate) fn key_lengths(add: &mut impl FnMut(&str), listed: bool, ragged: bool) {
    if ragged {
        add(part!("io/keys_ragged"));
    }
    add(match (listed, ragged) {
        (true, _) => part!("io/kv_lens"),
        (false, true) => part!("io/kv_lens_ragged"),
        (false, false) => part!("io/kv_lens_none"),
    });
    add(part!("io/status_bits"));
    add(part!("io/key_length"));
}

/// What a score gains or loses after the product: bias, boolean mask, ALiBi.
pub(crate) fn after_products(add: &mut impl FnMut(&str), bias: Option<Io>, masked: bool, alibi: bool) {
    if let Some(io) = bias {
        add(&load(io, Operand::Bias));
        add(&named(part!("io/row"), Operand::Bias));
        add(part!("io/bias"));
    } else {
        add(part!("io/bias_none"));
    }
    if masked {
        mask(add);
    } else {
        add(part!("io/mask_none"));
    }
    add(if alibi { part!("io/alibi") } else { part!("io/alibi_none") });
}

/// The boolean mask.
fn mask(add: &mut impl FnMut(&str)) {
    add(&named(part!("io/row"), Operand::Mask));
    add(&named(part!("io/mask"), Operand::Mask));
}

/// The lists: each from its own buffer, or all from one.
fn lists(add: &mut impl FnMut(&str), b: &Blueprint) {
    if b.bundled {
        add(&part!("io/bundle").replace("BINDING", &Slot::Bundle.number().to_string()));
    }
    for (operand, _) in BUNDLED {
        let own = b.lists().find(|&slot| {
            slot == Slot::Operand(operand) || (slot == Slot::Lengths && operand == Operand::KvLens)
        });
        let text = match (own, b.bundled) {
            (Some(slot), false) => part!("io/list").replace("BINDING", &slot.number().to_string()),
            (Some(_), true) => {
                add(&list_bundled(operand));
                continue;
            }
            (None, _) if b.kernel == Kernel::Bundle => part!("io/list_none").to_string(),
            (None, _) => continue,
        };
        add(&named(&text, operand));
    }
}

/// Where each list begins among those that lie in one buffer.
const BUNDLED: [(Operand, &str); 6] = [
    (Operand::AlibiSlopes, "0u"),
    (Operand::Sinks, "params.heads_q"),
    (Operand::KvLens, "2u * params.heads_q"),
    (Operand::CuSeqlensQ, "2u * params.heads_q + params.batch"),
    (Operand::CuSeqlensK, "2u * params.heads_q + 2u * params.batch + 1u"),
    (Operand::BlockTable, "2u * params.heads_q + 3u * params.batch + 2u"),
];

/// A list that lies among others in one buffer.
pub(crate) fn list_bundled(operand: Operand) -> String {
    let first = BUNDLED.iter().find(|(list, _)| *list == operand).map_or("0u", |(_, first)| first);
    named(part!("io/list_bundled"), operand).replace("FIRST", first)
}

/// The kernel's own compile-time sizes.
fn constants(b: &Blueprint) -> Vec<(&'static str, u32)> {
    let t = &b.tiles;
    let values = [("VALUES_ROWS", t.values_rows), ("VALUES_STEP", t.values_step)];
    let plain = !b.softcap && b.bias.is_none() && !b.alibi && !b.mask && b.key_terms == KeyTerms::None;
    let narrow = |io: Io| io.dtype != Dtype::F32;
    let own: &[(&str, u32)] = match b.kernel {
        // The linear map's.
        Kernel::Project | Kernel::ProjectQ | Kernel::ProjectK => &[],
        Kernel::NormalizeQ
        | Kernel::Lengths
        | Kernel::Bundle
        | Kernel::MaskMap
        | Kernel::Count
        | Kernel::Merge => &[("LANES", b.threads())],
        Kernel::KeyNorms => &[("KEYS", ELEMENT_LANES)],
        Kernel::UnpackK | Kernel::UnpackV => {
            let quads = t.row.width.div_ceil(4);
            &[("KEYS", ELEMENT_LANES), ("QUADS", quads), ("TURN", quads.min(16))]
        }
        Kernel::ScoresTile => &[("SIDE", t.scores_lanes), ("STEP", t.scores_step)],
        Kernel::ScoresDirect => {
            &[("LANES", t.scores_lanes), ("ROWS", t.scores_rows), ("KEYS", t.scores_keys / t.scores_lanes)]
        }
        Kernel::SoftmaxRow => &[("LANES", t.softmax_lanes), ("GROUP_ROWS", t.softmax_rows)],
        Kernel::ValuesTile => &[("SIDE", t.values_lanes)],
        Kernel::ValuesDirect => &[("LANES", t.values_lanes)],
        Kernel::Weights => &[("LANES", b.threads())],
        Kernel::FusedTile | Kernel::FusedSubgroup => &[
            ("TILE_Q", t.fused.tile_q()),
            ("LANES", t.fused.lanes),
            ("ROW_LANES", t.fused.row_lanes),
            ("ROWS", t.fused.rows),
            ("SLICE", t.fused.slice),
            ("QUADS", t.fused.quads),
            ("SLICES", t.fused.slices_v()),
            ("SHARE", t.fused.share()),
            ("SHARES", t.fused.shares()),
            ("Q_QUADS", t.fused.held),
            ("WHOLE_D", t.fused.whole[0].into()),
            ("WHOLE_V", t.fused.whole[1].into()),
            ("PLAIN", plain.into()),
        ],
        Kernel::FusedMatrix => &[
            ("EDGE", t.matrix.edge),
            ("BANDS", t.matrix.bands),
            ("LANES", t.matrix.lanes()),
            ("TILE_Q", t.matrix.tile_q()),
            ("TILE_KV", t.matrix.tile_kv),
            ("D_FRAGS", t.matrix.frags),
            ("WHOLE_D", t.matrix.whole.into()),
            ("WHOLE_V", t.matrix.fills_v().into()),
            ("KEY_FRAGS", t.matrix.key_frags()),
            ("SIDE", t.matrix.side()),
            ("CELL", if t.matrix.scalars { 4 } else { 1 }),
            ("COLUMNS", t.matrix.columns),
            ("OWN_FRAGS", t.matrix.own_frags()),
            ("ROUND_FRAGS", t.matrix.round_frags()),
            ("ROUNDS", t.matrix.own_frags().div_ceil(t.matrix.round_frags())),
            ("KEPT_Q", t.matrix.kept_q.into()),
            ("ROLLED", t.matrix.rolled.into()),
            ("PLAIN", plain.into()),
            ("Q_PARTS", t.matrix.parts),
        ],
        Kernel::FusedRow => &[
            ("LANES", t.row.threads),
            ("ROWS", t.row.rows),
            ("KEYS", t.row.keys),
            ("SIDE", t.row.side),
            ("SIDES", t.row.keys / t.row.side),
            ("LEVEL", t.row.level(b.q.is_some_and(narrow) && b.o.is_some_and(narrow))),
            ("QUADS", t.row.width.div_ceil(4)),
            ("QUADS_V", t.row.width_v.div_ceil(4)),
            ("MAPPED", b.mapped.into()),
            ("PLAIN", plain.into()),
        ],
    };
    let mut all = own.to_vec();
    match b.keys {
        Keys::Ring(capacity) => all.push(("RING", capacity)),
        Keys::Paged(page_size) => all.push(("PAGE", page_size)),
        Keys::Contiguous | Keys::Ragged => {}
    }
    if let Some(tile) = t.map().filter(|_| b.mapped || b.kernel == Kernel::MaskMap) {
        all.extend([("MAP_Q", tile.rows), ("MAP_KV", tile.keys)]);
    }
    if matches!(b.kernel, Kernel::SoftmaxRow | Kernel::ValuesTile | Kernel::ValuesDirect | Kernel::Weights) {
        all.extend(values);
    }
    all
}

/// A product of rows by the matrix `w`: what takes them and keeps what comes out, and the kernel. The widths
/// are parameters.
fn product(b: &Blueprint, to: &str, w: Operand, [width, out]: [&str; 2]) -> String {
    let number = Slot::Operand(w).number();
    let kernel = b.product.map_or(String::new(), |product| product.product_wgsl(number, [width, out]));
    let owners = part!("io/product").replace("OUT", out);
    [to, &owners, &kernel].join("\n")
}

/// Workgroup memory that fragments are read from and stored to, and threads by quads; in `scalars` or in vectors.
pub(crate) fn cells(scalars: bool, name: &str, of: &str) -> String {
    let text = if scalars { part!("exchange/elements") } else { part!("exchange/quads") };
    text.replace("NAME", name).replace("TYPE", of)
}

pub(crate) fn named(text: &str, operand: Operand) -> String {
    text.replace("OPERAND", &operand.to_string())
        .replace("BINDING", &Slot::Operand(operand).number().to_string())
}

/// Where a row of q or o lies.
fn row(operand: Operand, ragged: bool) -> String {
    named(if ragged { part!("io/row_ragged") } else { part!("io/row") }, operand)
}

/// The part that loads elements; by quads where they lie so, else one by one. Its names are placeholders.
pub(crate) const fn load_part(io: Io) -> &'static str {
    match (io.dtype, io.native, io.vec4) {
        (Dtype::Int8, ..) => part!("io/load_int8"),
        (Dtype::Int4, ..) => part!("io/load_int4"),
        (Dtype::F32, _, true) => part!("io/load_f32_vec4"),
        (Dtype::F32, _, false) => part!("io/load_f32_any"),
        (_, true, true) => part!("io/load_f16_vec4"),
        (_, true, false) => part!("io/load_f16_any"),
        (_, false, true) => part!("io/load_pair_vec4"),
        (_, false, false) => part!("io/load_pair_any"),
    }
}

fn load(io: Io, operand: Operand) -> String {
    named(load_part(io), operand).replace("DTYPE", &io.dtype.to_string())
}

/// The part that stores quads. Its names are placeholders.
pub(crate) fn store_part(io: Io) -> String {
    let by_element = |text: &str| format!("{text}\n{}", part!("io/store4_by_element"));
    match (io.dtype, io.native, io.vec4) {
        (Dtype::F32, _, true) => part!("io/store_f32_vec4").into(),
        (Dtype::F32, _, false) => by_element(part!("io/store_f32_any")),
        (_, true, true) => part!("io/store_f16_vec4").into(),
        (_, true, false) => by_element(part!("io/store_f16_any")),
        (_, false, true) => part!("io/store_pair_vec4").into(),
        (_, false, false) => part!("io/store_pair_any").into(),
    }
}

fn store(io: Io, operand: Operand, width: &str) -> String {
    named(&store_part(io), operand).replace("DTYPE", &io.dtype.to_string()).replace("WIDTH", width)
}
