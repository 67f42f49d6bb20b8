//! The kernels of a backward pass: what is compiled into each, its WGSL and its bindings.

use super::BackwardProblem;
use super::form::{self, BIAS_SIDE, BIAS_SLICE, Form, LANES, Makes, NEAR, SINK_THREADS};
use crate::blueprint::Io;
use crate::cache::Cache;
use crate::caps::{Caps, MANY_REGISTERS};
use crate::dtype::Dtype;
use crate::error::{Error, Operand, Result};
use crate::family::Family;
use crate::shader::{self, load_part, named, store_part};
use crate::slot::Slot;
use crate::unroll::unroll;

macro_rules! part {
    ($name:literal) => {
        include_str!(concat!("../../shaders/", $name, ".wgsl"))
    };
}

/// Everything that is compiled into one of these pipelines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Backward {
    pub(crate) makes: Makes,
    pub(crate) form: Form,
    q: Option<Io>,
    k: Option<Io>,
    v: Option<Io>,
    o: Option<Io>,
    dout: Option<Io>,
    grad: Option<Io>,
    bias: Option<Io>,
    softcap: bool,
    alibi: bool,
    mask: bool,
    kv_lens: bool,
    ragged_q: bool,
    ragged_k: bool,
    /// The others come in several parts.
    pub(crate) parts: bool,
}

impl Backward {
    /// `family` is a choice of the caller's: [`Family::FusedRow`], or any other for tiles.
    pub(crate) fn new(makes: Makes, problem: &BackwardProblem, family: Option<Family>, caps: &Caps) -> Self {
        let p = &problem.attention;
        let io = |operand: Operand| {
            let (dtype, layout) = (problem.dtype(operand), problem.layout(operand)?);
            // The bias and its gradient are read and written element by element, whatever their layouts.
            let by_element = matches!(operand, Operand::Bias | Operand::Dbias);
            let vec4 = !by_element && layout.is_vec4(problem.shape(operand)[3]);
            Some(Io { dtype, vec4, native: dtype == Dtype::F16 && caps.shader_f16 })
        };
        let rows = makes == Makes::Rows;
        // Of pairs: scores are computed again.
        let pairs = !rows && makes != Makes::Dsinks;
        let by_rows = family.map_or(caps.on_cpu(), |family| family == Family::FusedRow);
        let form = match makes {
            Makes::Rows => Form::Gather,
            Makes::Dbias => Form::Pairs { sums: problem.owners_of_bias().map(|owners| owners == 1) },
            Makes::Dsinks => Form::Head,
            _ => form::row(makes, problem, caps)
                .filter(|_| by_rows)
                .unwrap_or_else(|| form::tile(makes, problem, caps)),
        };
        let when = |wanted: bool, operand| if wanted { io(operand) } else { None };
        Self {
            makes,
            form,
            q: when(pairs, Operand::Q),
            k: when(pairs, Operand::K),
            v: when(pairs && makes != Makes::Dv, Operand::V),
            o: when(rows, Operand::O),
            dout: when(makes != Makes::Dsinks, Operand::Dout),
            grad: makes.gradient().and_then(io),
            bias: when(pairs, Operand::Bias),
            softcap: pairs && p.softcap.is_some(),
            alibi: p.alibi,
            mask: pairs && p.mask.is_some(),
            kv_lens: p.kv_lens,
            ragged_q: p.total_q.is_some(),
            ragged_k: matches!(p.cache, Cache::Ragged { .. }),
            parts: form::parts(makes, form, problem, caps) > 1,
        }
        .with_room_for_parts(caps)
    }

    /// On a GPU of few storage buffers, beside a bias and a mask, all others are one part.
    fn with_room_for_parts(self, caps: &Caps) -> Self {
        let room = caps.on_cpu() || self.storage().len() <= caps.max_storage_buffers as usize;
        Self { parts: self.parts && room, ..self }
    }

    /// Others of each part.
    pub(crate) fn part_others(&self, problem: &BackwardProblem, caps: &Caps) -> u64 {
        if self.parts { form::part_others(self.form, problem, caps) } else { u64::MAX }
    }

    pub(crate) fn name(&self) -> &'static str {
        match (self.makes, self.form) {
            (Makes::Rows, _) => "backward_rows",
            (Makes::Dq, Form::Row { .. }) => "backward_dq_row",
            (Makes::Dk, Form::Row { .. }) => "backward_dk_row",
            (Makes::Dv, Form::Row { .. }) => "backward_dv_row",
            (Makes::Dq, _) => "backward_dq",
            (Makes::Dk, _) => "backward_dk",
            (Makes::Dv, _) => "backward_dv",
            (Makes::Dbias, _) => "backward_dbias",
            (Makes::Dsinks, _) => "backward_dsinks",
        }
    }

    /// Threads of a workgroup.
    fn threads(&self) -> u32 {
        match self.form {
            Form::Tile { tile, .. } => tile.threads(),
            Form::Pairs { .. } => BIAS_SIDE * BIAS_SIDE,
            Form::Head => SINK_THREADS,
            Form::Gather | Form::Row { .. } => self.form.own_rows(),
        }
    }

    /// Workgroup memory: of the others' lse and delta where keys are owned, and of the rest.
    pub(crate) fn workgroup_bytes(&self) -> u32 {
        match self.form {
            Form::Tile { tile, held } => {
                form::tile_bytes(tile, held) + if self.owns_keys() { 8 * tile.tile_kv() } else { 0 }
            }
            Form::Pairs { .. } => 2 * 16 * 4 * BIAS_SIDE * (BIAS_SLICE + 1),
            Form::Head => 4 * SINK_THREADS,
            Form::Gather | Form::Row { .. } => 0,
        }
    }

    /// Quads that a row of sums has; of pairs, for each tile of keys.
    pub(crate) fn sum_quads(&self) -> u32 {
        match self.form {
            Form::Gather | Form::Head => 0,
            Form::Pairs { .. } => BIAS_SIDE,
            Form::Tile { tile, .. } => tile.lanes * tile.quads,
            Form::Row { quads, .. } => quads[usize::from(self.makes == Makes::Dv)],
        }
    }

    fn owns_keys(&self) -> bool {
        matches!(self.makes, Makes::Dk | Makes::Dv)
    }

    /// What of a device it would overstep.
    pub(crate) fn check(&self, caps: &Caps) -> Result<()> {
        for (what, need, got) in [
            ("threads of a workgroup", self.threads(), caps.max_invocations.min(caps.max_workgroup_size[0])),
            ("bytes of workgroup memory", self.workgroup_bytes(), caps.max_workgroup_bytes),
            ("registers of a thread", self.registers(), MANY_REGISTERS),
            ("storage buffers", self.storage().len() as u32, caps.max_storage_buffers),
        ] {
            if need > got {
                let what = format!("{}: {what}", self.name());
                return Err(Error::LimitExceeded { what, need: need.into(), got: got.into() });
            }
        }
        Ok(())
    }

    /// Registers of a thread; a processor's compiler puts what it has none for on the stack.
    fn registers(&self) -> u32 {
        if let Form::Tile { tile, .. } = self.form { tile.registers() } else { 0 }
    }

    /// The lists that are gathered.
    fn lists(&self) -> impl Iterator<Item = Operand> {
        [
            (self.alibi, Operand::AlibiSlopes),
            (self.kv_lens, Operand::KvLens),
            (self.ragged_q, Operand::CuSeqlensQ),
            (self.ragged_k, Operand::CuSeqlensK),
        ]
        .into_iter()
        .filter_map(|(present, operand)| present.then_some(operand))
    }

    /// The bindings but the uniform block.
    pub(crate) fn storage(&self) -> Vec<(Slot, bool)> {
        let operand = |operand| (Slot::Operand(operand), false);
        let mut all = Vec::from_iter(self.dout.map(|_| operand(Operand::Dout)));
        if self.makes == Makes::Dsinks {
            let gradient = (Slot::Operand(Operand::Dsinks), true);
            all.extend([operand(Operand::Sinks), (Slot::Gathered, false), gradient]);
        } else if let Some(gradient) = self.makes.gradient() {
            all.extend([Operand::Q, Operand::K].map(operand));
            all.extend(self.v.map(|_| operand(Operand::V)));
            all.extend(self.bias.map(|_| operand(Operand::Bias)));
            all.extend(self.mask.then_some(operand(Operand::Mask)));
            all.extend([(Slot::Gathered, false), (Slot::Operand(gradient), true)]);
            all.extend(self.parts.then_some((Slot::Carried, true)));
        } else {
            all.extend([Operand::O, Operand::Lse].into_iter().chain(self.lists()).map(operand));
            all.push((Slot::Gathered, true));
        }
        all
    }

    pub(crate) fn wgsl(&self) -> String {
        let mut out = String::new();
        let ios = [self.q, self.k, self.v, self.o, self.dout, self.grad, self.bias];
        if ios.iter().flatten().any(|io| io.native) {
            out.push_str("enable f16;\n");
        }
        out.push_str(&format!("// {}, composed from shaders/\n", self.name()));
        for (name, value) in self.sizes() {
            out.push_str(&format!("const {name}: u32 = {value}u;\n"));
        }
        for (name, value) in self.switches() {
            out.push_str(&format!("const {name} = {value};\n"));
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
        add(part!("backward/terms"));
        let load = |io: Io, operand, width: &str| {
            let quads = if io.vec4 { "" } else { part!("io/load4_by_element") };
            named(&format!("{}\n{quads}", load_part(io)), operand)
                .replace("DTYPE", &io.dtype.to_string())
                .replace("WIDTH", width)
        };
        if let Some(dout) = self.dout {
            add(&load(dout, Operand::Dout, "head_dim_v"));
        }
        let gathered = Slot::Gathered.number().to_string();
        if let Some(o) = self.o {
            add(&load(o, Operand::O, "head_dim_v"));
            add(&named(part!("io/row"), Operand::O));
            add(&named(part!("io/row"), Operand::Dout));
            add(&named(part!("io/list"), Operand::Lse));
            let lists: Vec<_> = self.lists().collect();
            for operand in [Operand::AlibiSlopes, Operand::KvLens, Operand::CuSeqlensQ, Operand::CuSeqlensK] {
                let there = lists.contains(&operand);
                add(&named(if there { part!("io/list") } else { part!("io/list_none") }, operand));
            }
            add(&part!("kernel/backward_rows").replace("BINDING", &gathered));
            return out;
        }
        let queries = if self.ragged_q { part!("io/queries_ragged") } else { part!("io/queries") };
        let number = |operand| Slot::Operand(operand).number().to_string();
        add(&part!("backward/gathered").replace("BINDING", &gathered));
        self.lists().for_each(|operand| add(&shader::list_bundled(operand)));
        add(queries);
        if self.makes == Makes::Dsinks {
            let text = part!("kernel/backward_sinks").replace("SINKS", &number(Operand::Sinks));
            add(&text.replace("GRAD", &number(Operand::Dsinks)));
            return out;
        }
        let row_of_queries = if self.ragged_q { part!("io/row_ragged") } else { part!("io/row") };
        let row_of_keys =
            [if self.ragged_k { part!("io/key_ragged") } else { part!("io/key") }, part!("io/key_row")];
        let row_of_keys = row_of_keys.join("\n");
        for (io, operand, width, row) in [
            (self.q, Operand::Q, "head_dim", row_of_queries),
            (self.k, Operand::K, "head_dim", &row_of_keys),
            (self.v, Operand::V, "head_dim_v", &row_of_keys),
        ] {
            let Some(io) = io else { continue };
            add(&load(io, operand, width));
            add(&named(row, operand));
        }
        add(&named(row_of_queries, Operand::Dout));
        if let (Some(io), Some(operand)) = (self.grad, self.makes.gradient()) {
            let row = match self.makes {
                Makes::Dbias => part!("io/row"),
                _ if self.owns_keys() => &row_of_keys,
                _ => row_of_queries,
            };
            add(&format!("{}\n{row}", store_part(io))
                .replace("OPERAND", "grad")
                .replace("BINDING", &number(operand))
                .replace("DTYPE", &io.dtype.to_string())
                .replace("WIDTH", self.width()));
        }
        shader::key_lengths(&mut add, self.kv_lens, self.ragged_k);
        add(part!("mask_tiles"));
        add(part!("mask"));
        shader::after_products(&mut add, self.bias, self.mask, self.alibi);
        add(part!("io/compared_dot"));
        add(part!("score"));
        if self.parts {
            add(&part!("backward/carried").replace("BINDING", &Slot::Carried.number().to_string()));
        }
        if !matches!(self.form, Form::Pairs { .. }) {
            add(if self.parts { part!("backward/part") } else { part!("backward/whole") });
            add(part!("backward/slope"));
        }
        let sizes = self.sizes();
        let mut unrolled = |text: &str| add(&unroll(text, &sizes));
        let keys = self.owns_keys();
        unrolled(if keys { part!("backward/own_keys") } else { part!("backward/own_queries") });
        match self.form {
            Form::Row { .. } => {
                unrolled(if keys { part!("backward/row_keys") } else { part!("backward/row_queries") });
                let x = if self.makes == Makes::Dv { "xb_" } else { "xa_" };
                unrolled(&part!("kernel/backward_row").replace("X_", x));
            }
            Form::Tile { held, .. } => {
                unrolled(if keys { part!("backward/tile_keys") } else { part!("backward/tile_queries") });
                let cached = held.is_none();
                unrolled(part!("exchange/pairs"));
                unrolled(if cached { part!("backward/own_cached") } else { part!("backward/own_held") });
                let width = format!("params.{}", self.width());
                unrolled(&part!("kernel/backward_tile").replace("OUT_WIDTH", &width));
            }
            Form::Pairs { .. } => unrolled(part!("kernel/backward_bias")),
            Form::Gather | Form::Head => {}
        }
        out
    }

    /// The gradient's width.
    fn width(&self) -> &'static str {
        match self.makes {
            Makes::Dv => "head_dim_v",
            Makes::Dbias => "seq_kv",
            _ => "head_dim",
        }
    }

    /// Sizes that are compiled in.
    fn sizes(&self) -> Vec<(&'static str, u32)> {
        let mut sizes = vec![
            ("OF_SCORES", (self.makes != Makes::Dv).into()),
            ("OUT_QUADS", self.sum_quads()),
            ("RAGGED_K", self.ragged_k.into()),
        ];
        match self.form {
            Form::Gather => return vec![("LANES", LANES)],
            Form::Head => return vec![("THREADS", SINK_THREADS)],
            Form::Pairs { .. } => {
                sizes.extend([("SIDE", BIAS_SIDE), ("SLICE", BIAS_SLICE), ("PARTS", self.parts.into())]);
            }
            Form::Row { threads, others, quads: [a, b] } => {
                sizes.extend([("LANES", threads), ("OTHERS", others), ("A_QUADS", a), ("B_QUADS", b)]);
                sizes.push(("NEAR", NEAR));
            }
            Form::Tile { tile, held } => {
                let [a, b] = held.unwrap_or_default();
                sizes.extend([
                    ("A_QUADS", a),
                    ("B_QUADS", b),
                    ("TILE", tile.tile_q()),
                    ("LANES", tile.lanes),
                    ("ROW_LANES", tile.row_lanes),
                    ("ROWS", tile.rows),
                    ("SLICE", tile.slice),
                    ("QUADS", tile.quads),
                    ("SLICES", tile.slices_v()),
                    ("SHARE", tile.share()),
                    ("SHARES", tile.shares()),
                ]);
            }
        }
        sizes
    }

    fn switches(&self) -> Vec<(&'static str, bool)> {
        let mut switches = vec![("SOFTCAP", self.softcap)];
        if let Form::Tile { tile, .. } = self.form {
            let plain = !self.softcap && self.bias.is_none() && !self.alibi && !self.mask;
            // What the weights are multiplied by lies there already.
            let staged = self.makes != Makes::Dv && tile.whole[0];
            switches.extend([("PLAIN", plain), ("STAGED", staged)]);
        }
        if let Form::Pairs { sums: [entries, heads] } = self.form {
            switches.extend([("SUMS_ENTRIES", entries), ("SUMS_HEADS", heads)]);
        }
        switches
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::mask::Align;
    use crate::pipeline::{Recipe, reflection};
    use crate::problem::{AttentionProblem, Bias};

    /// Problems with no option, with each by itself, and with all that go together.
    fn problems() -> Vec<AttentionProblem> {
        let new = |dim, dim_v| AttentionProblem::new(2, 4, 2, 70, 90, dim, dim_v);
        let plain = new(64, 64);
        let bias = Some(Bias { dtype: Dtype::F32, layout: Layout::broadcast([1, 4, 70, 90]) });
        let mask = Some(Layout::broadcast([2, 1, 1, 90]));
        let all = AttentionProblem {
            softcap: Some(30.0),
            bias,
            alibi: true,
            mask,
            causal: Some(Align::BottomRight),
            kv_lens: true,
            sinks: true,
            ..plain.clone()
        };
        let ragged = |p: AttentionProblem| {
            AttentionProblem { kv_lens: false, ..p }
                .with_cache(Cache::Ragged { total: 150 }, Dtype::F32)
                .with_ragged_queries(120)
        };
        vec![
            AttentionProblem { softcap: Some(30.0), ..plain.clone() },
            AttentionProblem { bias, ..plain.clone() },
            AttentionProblem { alibi: true, ..plain.clone() },
            AttentionProblem { mask, ..plain.clone() },
            AttentionProblem { kv_lens: true, ..plain.clone() },
            ragged(plain.clone()),
            ragged(all.clone()),
            AttentionProblem { ..all.clone() }.with_dtype(Dtype::F16),
            AttentionProblem { kv_dtype: Some(Dtype::Bf16), out_dtype: Dtype::F16, ..all.clone() },
            AttentionProblem::new(1, 4, 2, 5000, 9000, 96, 96).with_dtype(Dtype::Bf16),
            all,
            new(7, 33).with_dtype(Dtype::F16),
            new(7, 33).with_dtype(Dtype::Bf16),
            new(1, 1),
            new(512, 512),
            new(192, 128),
            plain,
        ]
    }

    #[test]
    fn every_kernel_is_valid_and_binds_what_it_says_inside_default_limits() {
        for shader_f16 in [false, true] {
            for on_cpu in [false, true] {
                let device_type = if on_cpu { wgpu::DeviceType::Cpu } else { wgpu::DeviceType::DiscreteGpu };
                let caps = Caps { shader_f16, device_type, ..Caps::minimal() };
                for attention in problems() {
                    let problem = BackwardProblem::of(&attention);
                    problem.validate().unwrap();
                    let families = [None, Some(Family::FusedTile), Some(Family::FusedRow)];
                    let makes = [Makes::Rows].into_iter().chain(Makes::GRADIENTS);
                    let makes = makes.filter(|m| m.gradient().is_none_or(|of| problem.layout(of).is_some()));
                    for (makes, family) in makes.flat_map(|m| families.map(|f| (m, f))) {
                        let kernel = Backward::new(makes, &problem, family, &caps);
                        // Sums that come in parts want a ninth buffer beside a bias and a mask.
                        let most = if kernel.parts {
                            caps.max_storage_buffers + 1
                        } else {
                            caps.max_storage_buffers
                        };
                        kernel.check(&Caps { max_storage_buffers: most, ..caps.clone() }).unwrap();
                        let bytes = reflection::check(Recipe::Backward(kernel), shader_f16);
                        assert_eq!(bytes, kernel.workgroup_bytes(), "{kernel:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let problem = BackwardProblem::of(&AttentionProblem::new(1, 1, 1, 8, 8, 1024, 1024));
        let error = Backward::new(Makes::Dq, &problem, None, &Caps::minimal()).check(&Caps::minimal());
        let Err(Error::LimitExceeded { what, .. }) = error else { panic!("{error:?}") };
        assert!(what.contains("backward_dq"), "{what}");
        let narrow = Caps { max_storage_buffers: 4, ..Caps::minimal() };
        let problem = BackwardProblem::of(&AttentionProblem::new(1, 1, 1, 8, 8, 64, 64));
        assert!(Backward::new(Makes::Dk, &problem, None, &narrow).check(&narrow).is_err());
    }
}
