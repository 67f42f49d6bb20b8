// ONNX Runtime's attention operators as CSV on stdout. Started by ./ort_cpu and ./ort_webgpu.
//
// One session holds one attention node over [B, S, H * D] tensors. Counted is session.run alone: feeds and outputs are
// prepared before and used again. On WebGPU they are GPU buffers, run only submits, and a sample ends when one element
// of the last output has been read back; CPU fallback is off, so a node without a WebGPU kernel is an error.

import { createRequire } from 'node:module'
import { existsSync, readFileSync } from 'node:fs'
import { availableParallelism, cpus } from 'node:os'
import { parseArgs } from 'node:util'
import { model } from './onnx_model.mjs'

const USAGE = `usage: ort_cpu|ort_webgpu [--shapes BxHq[/Hkv]xSq[/Sk]xD[/Dv],...] [--options plain,causal]
  [--dtype f32|f16] [--repeat N] [--threads N] [--op auto|mha|gqa|attention]`

const fail = message => { console.error(`${peer}: ${message}`); process.exit(2) }

const parseShape = text => {
  const parts = /^(\d+)x(\d+)(?:\/(\d+))?x(\d+)(?:\/(\d+))?x(\d+)(?:\/(\d+))?$/.exec(text)?.slice(1)
  if (!parts) fail(`bad shape '${text}', expected BxHq[/Hkv]xSq[/Sk]xD[/Dv]`)
  const [b, hq, hkv = hq, sq, sk = sq, d, dv = d] = parts.map(n => n && Number(n))
  const shape = { text, b, hq, hkv, sq, sk, d, dv }
  if ([b, hq, hkv, sq, sk, d, dv].some(n => n < 1) || hq % hkv) fail(`bad shape '${text}'`)
  return shape
}

// --- numbers ---

const bits = new DataView(new ArrayBuffer(4))
const toHalf = x => {
  bits.setFloat32(0, x)
  const u = bits.getUint32(0), sign = (u >>> 16) & 0x8000, size = Math.abs(x)
  if (size < 2 ** -14) return sign | Math.round(size * 2 ** 24)
  return sign | ((((u & 0x7fffffff) + 0xfff + ((u >>> 13) & 1)) >>> 13) - (112 << 10))
}
const fromHalf = h => {
  const e = (h >>> 10) & 31, m = h & 1023, sign = h & 0x8000 ? -1 : 1
  if (e === 31) return m ? NaN : sign * Infinity
  return sign * (e ? (1 + m / 1024) * 2 ** (e - 15) : m * 2 ** -24)
}

let state = 1
const uniform = () => { // mulberry32
  state = (state + 0x6d2b79f5) | 0
  let t = Math.imul(state ^ (state >>> 15), 1 | state)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
}
const normals = (n, half) => {
  const out = half ? new Uint16Array(n) : new Float32Array(n)
  for (let i = 0; i < n; i += 2) {
    const r = Math.sqrt(-2 * Math.log(1 - uniform())), a = 2 * Math.PI * uniform()
    for (const [j, x] of [[i, r * Math.cos(a)], [i + 1, r * Math.sin(a)]]) if (j < n) out[j] = half ? toHalf(x) : x
  }
  return out
}

const median = xs => {
  const s = xs.toSorted((a, b) => a - b)
  return (s[(s.length - 1) >> 1] + s[s.length >> 1]) / 2
}

// At most `most` of 0..n, evenly spread, the first and the last among them.
const spread = (n, most) =>
  n <= most ? [...Array(n).keys()] : [...Array(most).keys()].map(i => Math.round((i * (n - 1)) / (most - 1)))

// max|o - o64| over up to 32 (batch, head) pairs and 64 rows of each, o64 computed in float64.
const maxError = ({ b, hq, hkv, sq, sk, d, dv }, q, k, v, o, half, causal) => {
  const get = half ? (x, i) => fromHalf(x[i]) : (x, i) => x[i]
  const row = (x, batch, s, heads, h, length, width) => {
    const at = ((batch * length + s) * heads + h) * width
    return Float64Array.from({ length: width }, (_, i) => get(x, at + i))
  }
  let worst = 0
  for (const pair of spread(b * hq, 32)) {
    const batch = Math.floor(pair / hq), h = pair % hq, hk = Math.floor(h / (hq / hkv))
    const keys = [...Array(sk).keys()].map(j => row(k, batch, j, hkv, hk, sk, d))
    const values = [...Array(sk).keys()].map(j => row(v, batch, j, hkv, hk, sk, dv))
    for (const i of spread(sq, 64)) {
      const query = row(q, batch, i, hq, h, sq, d), length = causal ? Math.min(i + 1, sk) : sk
      const s = keys.slice(0, length).map(key => {
        let dot = 0
        for (let c = 0; c < d; c++) dot += query[c] * key[c]
        return dot / Math.sqrt(d)
      })
      let top = -Infinity, sum = 0
      for (const x of s) top = Math.max(top, x)
      const o64 = new Float64Array(dv)
      s.forEach((x, j) => {
        const p = Math.exp(x - top)
        sum += p
        for (let c = 0; c < dv; c++) o64[c] += p * values[j][c]
      })
      row(o, batch, i, hq, h, sq, dv).forEach((x, c) => {
        const error = Math.abs(x - o64[c] / sum)
        if (!(error <= worst)) worst = error // NaN stays
      })
    }
  }
  return worst
}

// --- the operator ---

// The fastest that ONNX Runtime has for the case. GroupQueryAttention is always causal: it serves causal self attention
// and, with a cache that already holds the keys, one query after all of them. WebGPU has no kernel for Attention.
const chooseOp = ({ hq, hkv, sq, d, dv }, causal) => {
  if (d === dv && (causal || (sq === 1 && provider === 'webgpu'))) return 'gqa'
  return hq === hkv && (sq > 1 || provider === 'webgpu') ? 'mha' : 'attention'
}

const attention = (op, shape, causal, type, q, k, v) => {
  const { b, hq, hkv, sq, sk, d, dv } = shape
  const tensor = (data, dims) => new ort.Tensor(data instanceof Int32Array ? 'int32' : type, data, dims)
  const feeds = { q: tensor(q, [b, sq, hq * d]), k: tensor(k, [b, sk, hkv * d]), v: tensor(v, [b, sk, hkv * dv]) }
  const outputs = [{ name: 'o', type, dims: [b, sq, hq * dv] }]
  if (op === 'mha') {
    if (hq !== hkv) throw Error('MultiHeadAttention has no grouped heads')
    const attributes = { num_heads: hq, unidirectional: Number(causal) }
    return { feeds, outputs, node: { op: 'MultiHeadAttention', domain: 'com.microsoft', attributes } }
  }
  if (op === 'attention') {
    const attributes = { q_num_heads: hq, kv_num_heads: hkv, is_causal: Number(causal) }
    return { feeds, outputs, node: { op: 'Attention', attributes } }
  }
  const decode = !causal && sq === 1
  if (d !== dv || !(decode || (causal && sq === sk))) throw Error('GroupQueryAttention is causal, with D = Dv')
  const cache = [b, hkv, sk, d]
  outputs.push({ name: 'present_k', type, dims: cache }, { name: 'present_v', type, dims: cache })
  const counts = { last: new Int32Array(b).fill(sk - 1), total: Int32Array.of(sk) }
  const inputs = ['q', 'k', 'v', '', '', 'last', 'total']
  if (decode) { // the cache is [B, Hkv, Sk, D] and its last row, the new key and value, is written again by each run
    for (const [name, x] of [['k', k], ['v', v]]) {
      const past = new x.constructor(x.length), fresh = new x.constructor(b * hkv * d)
      for (let i = 0; i < b; i++) for (let h = 0; h < hkv; h++) for (let j = 0; j < sk; j++) {
        const from = ((i * sk + j) * hkv + h) * d, row = x.subarray(from, from + d)
        past.set(row, ((i * hkv + h) * sk + j) * d)
        if (j === sk - 1) fresh.set(row, (i * hkv + h) * d)
      }
      feeds[name] = tensor(fresh, [b, 1, hkv * d])
      feeds[`past_${name}`] = tensor(past, cache)
    }
    inputs.splice(3, 2, 'past_k', 'past_v')
  }
  return {
    feeds: { ...feeds, last: tensor(counts.last, [b]), total: tensor(counts.total, [1]) }, outputs, inputs, decode,
    node: { op: 'GroupQueryAttention', domain: 'com.microsoft', attributes: { num_heads: hq, kv_num_heads: hkv } },
  }
}

// --- running ---

const session = (spec, options = {}) => ort.InferenceSession.create(model(spec), {
  executionProviders: [provider], executionMode: 'sequential', interOpNumThreads: 1, intraOpNumThreads: threads,
  logSeverityLevel: 4,
  ...(provider === 'webgpu' && { extra: { session: { disable_cpu_ep_fallback: '1' } } }),
  ...options,
})
const described = tensors => Object.entries(tensors).map(([name, { type, dims }]) => ({ name, type, dims }))

// Identity sessions move tensors: this binding has no other way to or from a GPU buffer.
const moved = async (tensors, preferredOutputLocation) => {
  const s = await session({
    nodes: Object.keys(tensors).map(name => ({ op: 'Identity', inputs: [name], outputs: [`${name}_`] })),
    inputs: described(tensors), outputs: described(tensors).map(t => ({ ...t, name: `${t.name}_` })),
  }, { graphOptimizationLevel: 'disabled', preferredOutputLocation })
  const out = await s.run(tensors)
  return Object.fromEntries(Object.keys(tensors).map(name => [name, out[`${name}_`]]))
}

const measure = async (shape, causal, op) => {
  const { b, hq, hkv, sq, sk, d, dv } = shape, half = dtype === 'f16', type = half ? 'float16' : 'float32'
  const [q, k, v] = [b * sq * hq * d, b * sk * hkv * d, b * sk * hkv * dv].map(n => normals(n, half))
  const { feeds, outputs, node, inputs = Object.keys(feeds), decode } = attention(op, shape, causal, type, q, k, v)
  const gpu = provider === 'webgpu', place = gpu ? 'gpu-buffer' : 'cpu'
  const { last, total, ...large } = feeds // the two counts of GroupQueryAttention: `total` is read by the host
  const ready = { ...(gpu ? await moved(large, place) : large), ...(last && { last, total }) }
  const main = await session({
    nodes: [{ ...node, inputs, outputs: outputs.map(o => o.name) }], inputs: described(feeds), outputs,
  }, gpu ? { preferredOutputLocation: place } : {})
  // A cache is written in place: the outputs are the very buffers of the inputs.
  const first = Object.fromEntries(outputs.map(o => [o.name, null]))
  if (decode) Object.assign(first, { present_k: ready.past_k, present_v: ready.past_v })
  const kept = { ...await main.run(ready, first), ...(decode && { present_k: ready.past_k, present_v: ready.past_v }) }
  const run = () => main.run(ready, kept)
  let wait = async () => {}
  if (gpu) {
    const element = await session({
      nodes: [{ op: 'Slice', inputs: ['o', 'from', 'to'], outputs: ['element'] }],
      constants: { from: [0, 0, 0], to: [1, 1, 1] },
      inputs: [outputs[0]], outputs: [{ name: 'element', type, dims: [1, 1, 1] }],
    })
    wait = () => element.run({ o: kept.o })
  }
  const sample = async calls => {
    const start = performance.now()
    for (let i = 0; i < calls; i++) await run()
    await wait()
    return (performance.now() - start) / calls
  }
  await sample(1)
  // Short calls are counted several to a sample, so that waiting for the GPU weighs little.
  const calls = Math.min(64, Math.max(1, Math.ceil(20 / await sample(1))))
  const times = []
  for (let i = 0; i < repeat; i++) times.push(await sample(calls))
  const { o } = gpu ? await moved({ o: kept.o }, 'cpu') : kept
  const error = maxError(shape, q, k, v, o.data, half, causal)
  if (gpu) for (const t of new Set([...Object.values(ready), ...Object.values(kept)])) t.location === place && t.dispose()
  await main.release()
  const ms = median(times), flop = (2 * b * hq * sq * sk * (d + dv)) / (causal ? 2 : 1)
  return { ms: ms.toFixed(4), gflops: (flop / ms / 1e6).toFixed(2), max_error: error.toExponential(3) }
}

const adapterName = () => {
  if (provider === 'cpu') return `${cpus()[0]?.model ?? process.arch} x${threads}`
  if (process.env.PEER_ADAPTER_LABEL) return process.env.PEER_ADAPTER_LABEL
  const maps = existsSync('/proc/self/maps') ? readFileSync('/proc/self/maps', 'utf8') : ''
  const drivers = maps.match(/lib(vulkan_\w+|GLX_nvidia|nvidia-glcore|vk_swiftshader)\.so[\w.]*/g) ?? []
  return [...new Set(drivers)].join(' + ') || process.platform
}

// --- the command ---

const provider = process.argv[2] === 'webgpu' ? 'webgpu' : 'cpu'
const peer = `ort_${provider}`
let args
try {
  args = parseArgs({
    args: process.argv.slice(3), options: {
      shapes: { type: 'string', default: '1x8x512x64,1x8x1024x64,1x8x2048x64' },
      options: { type: 'string', default: 'plain,causal' },
      dtype: { type: 'string', default: 'f32' },
      repeat: { type: 'string', default: '10' },
      threads: { type: 'string', default: String(availableParallelism()) },
      op: { type: 'string', default: 'auto' },
      help: { type: 'boolean', short: 'h' },
    },
  }).values
} catch (e) { fail(`${e.message}\n${USAGE}`) }
if (args.help) { console.log(USAGE); process.exit(0) }
const { dtype } = args, repeat = Number(args.repeat), threads = Number(args.threads)
const shapes = args.shapes.split(',').map(parseShape), options = args.options.split(',')
if (!['f32', 'f16'].includes(dtype)) fail(`unknown dtype '${dtype}'`)
if (!['auto', 'mha', 'gqa', 'attention'].includes(args.op)) fail(`unknown operator '${args.op}'`)
if (!(repeat >= 1 && threads >= 1)) fail('--repeat and --threads start at 1')
for (const o of options) if (!['plain', 'causal'].includes(o)) fail(`unknown option '${o}'`)
process.env.LP_NUM_THREADS = threads // lavapipe's own, read when it is loaded

const require = createRequire(`${process.env.PEER_ORT ?? '.'}/`)
const ort = require('onnxruntime-node')
const { version } = require('onnxruntime-node/package.json')

console.log('peer,version,adapter,dtype,shape,options,ms,gflops,max_error')
let rows = 0
for (const shape of shapes) for (const option of options) {
  const causal = option === 'causal'
  if (causal && shape.sq !== shape.sk) {
    console.error(`${peer}: ${shape.text} causal skipped: peers align Sq != Sk differently`)
    continue
  }
  const op = args.op === 'auto' ? chooseOp(shape, causal) : args.op
  try {
    const { ms, gflops, max_error } = await measure(shape, causal, op)
    const adapter = adapterName().replaceAll(',', ' ')
    console.log([peer, `${version} ${op}`, adapter, dtype, shape.text, option, ms, gflops, max_error].join())
    rows++
  } catch (e) {
    console.error(`${peer}: ${shape.text} ${option} (${op}) skipped: ${e.message.split('\n')[0]}`)
  }
}
process.exit(rows ? 0 : 1)
