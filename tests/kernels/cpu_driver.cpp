// The CPU kernels without Python: every function of the C interface, on each instruction set of the
// machine, for float and for bfloat16 tensors, against plain loops in double precision.
//
// Every tensor is a heap block of exactly its size, every output begins as NaN, and every call runs on
// a thread of its own, whose scratch is made for it alone: under AddressSanitizer, to read or write one
// element too many is an error. Ends with 1 at the first difference.
#include <math.h>
#include <stdio.h>

#include <random>
#include <string>
#include <thread>

#include "library.cpp"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
template <class S>
using Stored = std::vector<S>;  // float or Bf16

constexpr int64_t SEED = 0x123456789ABCDEF;
std::mt19937 engine(1);

float value(float x) { return x; }

float value(Bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

template <class S>
S cut(float x);  // toward zero

template <>
float cut(float x) { return x; }

template <>
Bf16 cut(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return {(uint16_t)(bits >> 16)};
}

float rounded(float x, bool bfloat16) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (bfloat16) bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
  memcpy(&x, &bits, 4);
  return x;
}

template <class S = float>
Stored<S> normals(size_t n) {
  std::normal_distribution<float> normal;
  Stored<S> x(n);
  for (S& each : x) each = cut<S>(normal(engine));
  return x;
}

template <class S = float>
Stored<S> unwritten(size_t n) { return Stored<S>(n, cut<S>(NAN)); }

template <class Call>
void apart(Call call) {
  std::thread([&] {
    if (int64_t code = call()) {
      printf("a call returned %lld\n", (long long)code);
      exit(1);
    }
  }).join();
}

int checks = 0;
std::string set_name, about;

// Arithmetic is float's; a Bf16 is off by its own rounding besides, and by no other.
template <class S>
void compare(const char* name, const Stored<S>& got, const Doubles& expected) {
  const double allowed = 1e-5 + (sizeof(S) == 2 ? 1.0 / 256 : 0);
  double largest = 1, error = 0;
  for (double x : expected) largest = std::max(largest, fabs(x));
  for (size_t i = 0; i < expected.size(); i++) {
    const double off = fabs(value(got[i]) - expected[i]);
    if (!(off <= error)) error = off;  // NaN is an error too
    if (isnan(off)) break;
  }
  checks++;
  if (error <= allowed * largest) return;
  printf("%s: %s is %g off, its largest value is %g\n", about.c_str(), name, error, largest);
  exit(1);
}

// What dropout multiplies element `k` by, the words of its counter after the first being c1, c2, c3.
double factor(uint32_t threshold, uint32_t k, uint32_t c1, uint32_t c2, uint32_t c3) {
  if (!threshold) return 1;
  if (threshold >= 65536) return 0;
  uint32_t c[4] = {k / 8, c1, c2, c3}, key0 = (uint32_t)SEED, key1 = (uint32_t)(SEED >> 32);
  for (int i = 0; i < 7; i++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint64_t p0 = (uint64_t)c[0] * 0xD2511F53u, p1 = (uint64_t)c[2] * 0xCD9E8D57u;
    const uint32_t next[4] = {(uint32_t)(p1 >> 32) ^ c[1] ^ key0, (uint32_t)p1,
                              (uint32_t)(p0 >> 32) ^ c[3] ^ key1, (uint32_t)p0};
    memcpy(c, next, sizeof c);
  }
  const uint32_t word = c[k % 8 / 2], uniform = k % 2 ? word >> 16 : word & 0xFFFF;
  return uniform >= threshold ? 65536.0 / (65536 - threshold) : 0;
}

// ---- attention -----------------------------------------------------------------------------------

template <class S>
void attention(const std::vector<int32_t>& lens, int64_t heads, int64_t dim, bool causal,
               uint32_t threshold) {
  std::vector<int32_t> starts;
  int64_t rows = 0;
  for (int32_t n : lens) starts.push_back((int32_t)++rows), rows += n;  // a dead row before each
  const size_t size = rows * heads * dim;
  const float scale = 1 / sqrtf((float)dim);
  Stored<S> q = normals<S>(size), k = normals<S>(size), v = normals<S>(size), dout = normals<S>(size);
  for (int32_t start : starts)
    for (Stored<S>* x : {&q, &k, &v, &dout})
      std::fill_n(x->begin() + (start - 1) * heads * dim, heads * dim, cut<S>(NAN));
  Stored<S> out = unwritten<S>(size), dq = out, dk = out, dv = out;
  Floats lse = unwritten(heads * rows);

  auto view = [&](Stored<S>& x) { return View<void>{x.data(), heads * dim, dim}; };
  const Tensors t = {view(q), view(k), view(v), view(out), view(dout), view(dq), view(dk), view(dv)};
  apart([&] {
    return fasttx_attention_forward(sizeof(S) == 2, &t, lse.data(), starts.data(), lens.data(),
                                    lens.size(), rows, heads, dim, scale, causal, SEED, threshold, 1);
  });
  apart([&] {
    return fasttx_attention_backward(sizeof(S) == 2, &t, lse.data(), starts.data(), lens.data(),
                                     lens.size(), rows, heads, dim, scale, causal, SEED, threshold, 1);
  });

  Doubles o(size), gq(size), gk(size), gv(size);
  for (size_t s = 0; s < lens.size(); s++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < lens[s]; i++) {
        auto at = [&](int64_t r) { return ((starts[s] + r) * heads + h) * dim; };
        auto dot = [&](const Stored<S>& x, int64_t r, const Stored<S>& y, int64_t c) {
          double sum = 0;
          for (int64_t d = 0; d < dim; d++) sum += (double)value(x[at(r) + d]) * value(y[at(c) + d]);
          return sum;
        };
        const int64_t keys = causal ? i + 1 : lens[s];
        Doubles p(keys), m(keys);
        const double delta = dot(dout, i, out, i);  // the sum of p m dP, out as it was stored
        double total = 0;
        for (int64_t j = 0; j < keys; j++) total += p[j] = exp(dot(q, i, k, j) * scale);
        for (int64_t j = 0; j < keys; j++) {
          p[j] /= total;
          m[j] = factor(threshold, j, i, h, s);
        }
        for (int64_t j = 0; j < keys; j++) {
          const double ds = p[j] * (m[j] * dot(dout, i, v, j) - delta) * scale;
          for (int64_t d = 0; d < dim; d++) {
            o[at(i) + d] += p[j] * m[j] * value(v[at(j) + d]);
            gv[at(j) + d] += p[j] * m[j] * value(dout[at(i) + d]);
            gq[at(i) + d] += ds * value(k[at(j) + d]);
            gk[at(j) + d] += ds * value(q[at(i) + d]);
          }
        }
      }
  compare("out", out, o);
  compare("dq", dq, gq);
  compare("dk", dk, gk);
  compare("dv", dv, gv);
}

// ---- row operations ------------------------------------------------------------------------------

template <class S>
void add_norm(int64_t rows, int64_t columns, uint32_t threshold) {
  const size_t size = rows * columns;
  Floats h = normals(size), bias = normals(columns), gamma = normals(columns), beta = normals(columns),
         dsum = normals(size);
  Stored<S> y = normals<S>(size), dnormed = normals<S>(size), normed = unwritten<S>(size), dy = normed;
  Floats sum = unwritten(size), dh = sum, mean = unwritten(rows), rstd = mean,
         dgamma = unwritten(columns), dbeta = dgamma, dbias = dgamma;
  apart([&] {
    return fasttx_add_norm_forward(sizeof(S) == 2, h.data(), y.data(), bias.data(), gamma.data(),
                                   beta.data(), sum.data(), normed.data(), mean.data(), rstd.data(), rows,
                                   columns, 1e-5f, SEED, threshold, 1);
  });
  apart([&] {
    return fasttx_add_norm_backward(sizeof(S) == 2, sum.data(), gamma.data(), mean.data(), rstd.data(),
                                    dsum.data(), dnormed.data(), dh.data(), dy.data(), dgamma.data(),
                                    dbeta.data(), dbias.data(), rows, columns, SEED, threshold, 1);
  });

  Doubles s(size), n(size), gh(size), gy(size), ggamma(columns), gbeta(columns), gbias(columns);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = r * columns;
    double average = 0, variance = 0, along = 0, across = 0;
    for (int64_t c = 0; c < columns; c++) {
      s[at + c] = h[at + c] + ((double)value(y[at + c]) + bias[c]) * factor(threshold, c, r, 0, 0);
      average += s[at + c] / columns;
    }
    for (int64_t c = 0; c < columns; c++) variance += pow(s[at + c] - average, 2) / columns;
    const double inverse = 1 / sqrt(variance + 1e-5);
    for (int64_t c = 0; c < columns; c++) {
      const double x = (s[at + c] - average) * inverse, dn = value(dnormed[at + c]), g = dn * gamma[c];
      n[at + c] = x * gamma[c] + beta[c];
      ggamma[c] += dn * x;
      gbeta[c] += dn;
      across += g / columns;
      along += g * x / columns;
    }
    for (int64_t c = 0; c < columns; c++) {
      const double x = (s[at + c] - average) * inverse, g = (double)value(dnormed[at + c]) * gamma[c];
      gh[at + c] = (g - across - x * along) * inverse + dsum[at + c];
      gy[at + c] = gh[at + c] * factor(threshold, c, r, 0, 0);
      gbias[c] += gy[at + c];
    }
  }
  compare("sum", sum, s);
  compare("normed", normed, n);
  compare("dh", dh, gh);
  compare("dy", dy, gy);
  compare("dgamma", dgamma, ggamma);
  compare("dbeta", dbeta, gbeta);
  compare("dbias", dbias, gbias);
}

template <class S>
void bias_act(int64_t rows, int64_t columns, bool gelu, uint32_t threshold) {
  const size_t size = rows * columns;
  Stored<S> u = normals<S>(size), dout = normals<S>(size), out = unwritten<S>(size), du = out;
  Floats bias = normals(columns), dbias = unwritten(columns);
  apart([&] {
    return fasttx_bias_act_forward(sizeof(S) == 2, u.data(), bias.data(), out.data(), rows, columns, gelu,
                                   SEED, threshold, 1);
  });
  apart([&] {
    return fasttx_bias_act_backward(sizeof(S) == 2, gelu ? u.data() : nullptr, gelu ? bias.data() : nullptr,
                                    gelu ? nullptr : out.data(), dout.data(), du.data(), dbias.data(), rows,
                                    columns, gelu, SEED, threshold, 1);
  });

  Doubles o(size), g(size), gbias(columns);
  for (size_t i = 0; i < size; i++) {
    const double x = (double)value(u[i]) + bias[i % columns];
    const double m = factor(threshold, i % columns, i / columns, 0, 0);
    const double cdf = gelu ? 0.5 * erfc(-x / sqrt(2.0)) : x > 0;
    const double slope = gelu ? cdf + x * exp(-x * x / 2) / sqrt(2 * M_PI) : cdf;
    o[i] = x * cdf * m;
    g[i] = value(dout[i]) * slope * m;
    gbias[i % columns] += g[i];
  }
  compare("out", out, o);
  compare("du", du, g);
  compare("dbias", dbias, gbias);
}

void embed(int64_t rows, int64_t columns, uint32_t threshold) {
  const int64_t words = 5, places = 3;
  const size_t size = rows * columns;
  const float scale = sqrtf((float)columns);
  Floats table = normals(words * columns), positions = normals(places * columns), dh = normals(size);
  Floats h = unwritten(size), dtable = unwritten(words * columns);
  std::vector<int64_t> ids(rows);
  std::vector<int32_t> position_ids(rows);
  for (int64_t r = 0; r < rows; r++) ids[r] = (rows - r) % words, position_ids[r] = (int32_t)(r % places);
  apart([&] {
    return fasttx_embed_forward(ids.data(), position_ids.data(), table.data(), positions.data(), h.data(),
                                rows, columns, words, places, scale, SEED, threshold, 1);
  });
  apart([&] {
    return fasttx_embed_backward(ids.data(), dh.data(), dtable.data(), rows, columns, words, scale, SEED,
                                 threshold, 1);
  });

  Doubles e(size), g(words * columns);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const double m = factor(threshold, c, r, 0, 0);
      e[r * columns + c] = ((double)table[ids[r] * columns + c] * scale +
                            positions[position_ids[r] * columns + c]) * m;
      g[ids[r] * columns + c] += dh[r * columns + c] * (double)scale * m;
    }
  compare("h", h, e);
  compare("dtable", dtable, g);
}

// Forward: y = dropout(act(x W^T + bias)), and what went into act. With a gate: the backward pass of that.
template <class S>
void linear(int64_t rows, int64_t n, int64_t k, bool transposed, Act act, bool gated, uint32_t threshold) {
  const bool bfloat16 = sizeof(S) == 2;
  Stored<S> x = normals<S>(rows * k), gate = normals<S>(rows * n), y = unwritten<S>(rows * n), before = y;
  Floats w = normals(n * k), bias = normals(n);
  const int64_t w_row = transposed ? 1 : k, w_column = transposed ? n : 1;
  apart([&] {
    return fasttx_linear_forward(bfloat16, x.data(), w.data(), w_row, w_column, gated ? nullptr : bias.data(),
                                 gated ? gate.data() : nullptr, gated ? nullptr : before.data(), y.data(),
                                 rows, n, k, (int)act, SEED, threshold, 1);
  });

  Doubles sums(rows * n), ends(rows * n);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < n; c++) {
      double sum = gated ? 0 : bias[c];
      for (int64_t d = 0; d < k; d++)
        sum += (double)value(x[r * k + d]) * rounded(w[c * w_row + d * w_column], bfloat16);
      const double u = gated ? value(gate[r * n + c]) : sum;
      double slope = 1, m = factor(threshold, c, r, 0, 0);
      if (act == Act::RELU) slope = u > 0;
      if (act == Act::RELU && gated) m = threshold ? 65536.0 / (65536 - threshold) : 1;
      if (act == Act::GELU) {
        slope = 0.5 * erfc(-u / sqrt(2.0));
        if (gated) slope += u * exp(-u * u / 2) / sqrt(2 * M_PI);
      }
      sums[r * n + c] = sum;
      ends[r * n + c] = sum * slope * m;
    }
  if (!gated) compare("before", before, sums);
  compare("y", y, ends);
}

template <class S>
void weight_gradient(int64_t rows, int64_t n, int64_t k) {
  Stored<S> g = normals<S>(rows * n), x = normals<S>(rows * k);
  Floats dw = unwritten(n * k), dbias = unwritten(n);
  apart([&] {
    return fasttx_weight_gradient(sizeof(S) == 2, g.data(), x.data(), dw.data(), dbias.data(), rows, n, k, 1);
  });

  Doubles gw(n * k), gbias(n);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < n; i++) {
      gbias[i] += value(g[r * n + i]);
      for (int64_t j = 0; j < k; j++) gw[i * k + j] += (double)value(g[r * n + i]) * value(x[r * k + j]);
    }
  compare("dw", dw, gw);
  compare("dbias", dbias, gbias);
}

// Bf16 is the nearest there is, ties to even; infinity and NaN stay what they are.
void rounding() {
  const struct { uint32_t bits; uint16_t rounded; } cases[] = {
      {0x3F800000, 0x3F80}, {0x3F807FFF, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F808001, 0x3F81},
      {0x3F818000, 0x3F82}, {0xBF818000, 0xBF82}, {0x3FFFFFFF, 0x4000}, {0x7F7FFFFF, 0x7F80},
      {0x7F7F7FFF, 0x7F7F}, {0x7F800000, 0x7F80}, {0xFF800000, 0xFF80}, {0x80000001, 0x8000},
      {0x7FC00000, 0x7FC0}, {0x7FFFFFFF, 0x7FFF}, {0xFFFFFFFF, 0xFFFF}, {0x7F800001, 0x7FC0},
      {0x00007FFF, 0x0000}, {0x00008001, 0x0001}, {0x00018000, 0x0002}};
  // Where gamma is 0, beta comes out of add_norm as it is.
  const int64_t columns = std::size(cases);
  Floats h = normals(columns), zero(columns), beta(columns), sum(columns), mean(1), rstd(1);
  Stored<Bf16> y = normals<Bf16>(columns), normed = unwritten<Bf16>(columns);
  for (int64_t c = 0; c < columns; c++) memcpy(&beta[c], &cases[c].bits, 4);
  apart([&] {
    return fasttx_add_norm_forward(1, h.data(), y.data(), zero.data(), zero.data(), beta.data(), sum.data(),
                                   normed.data(), mean.data(), rstd.data(), 1, columns, 1e-5f, 0, 0, 1);
  });
  for (int64_t c = 0; c < columns; c++)
    if (normed[c].bits != cases[c].rounded) {
      printf("%s: %08x became %04x, not %04x\n", about.c_str(), cases[c].bits, normed[c].bits,
             cases[c].rounded);
      exit(1);
    }
  checks++;
}

template <class S>
void every_operation() {
  const std::string stored = sizeof(S) == 2 ? " bfloat16 " : " float32 ";
  engine.seed(1);  // the same numbers for every set
  // How a mask is drawn does not depend on what tensors hold.
  const std::vector<uint32_t> thresholds =
      sizeof(S) == 4 ? std::vector<uint32_t>{0, 6554, 65536} : std::vector<uint32_t>{6554};
  for (uint32_t threshold : thresholds) {
    auto name = [&](const char* op, int64_t a, int64_t b) {
      about = set_name + stored + op + " " + std::to_string(a) + " " + std::to_string(b) + " threshold " +
              std::to_string(threshold);
    };
    for (int64_t dim : {1, 8, 13, 16, 20, 32, 50, 64, 100, 128})
      for (bool causal : {false, true}) {
        if (threshold == 65536 && dim != 13) continue;  // all is dropped
        name(causal ? "causal attention" : "attention", 2, dim);
        attention<S>({1, 17, 0, 50, 33}, 2, dim, causal, threshold);
      }
    // More queries than a thread takes at a time.
    for (bool causal : {false, true})
      if (threshold == 6554 && (causal || sizeof(S) == 4)) {
        name(causal ? "causal attention" : "attention", 1, 12);
        attention<S>({7, 514}, 1, 12, causal, threshold);
      }
    for (int64_t columns : {1, 3, 8, 13, 16, 17, 31, 33, 100})
      for (int64_t rows : {1, 21, 530}) {
        name("rows", rows, columns);
        if (columns > 1) add_norm<S>(rows, columns, threshold);
        bias_act<S>(rows, columns, false, threshold);
        bias_act<S>(rows, columns, true, threshold);
        if (sizeof(S) == 4) embed(rows, columns, threshold);
      }
  }
  // Around the heights of tiles, the widths of panels, the chunks of a depth; rows whose distance collides.
  const int64_t shapes[][3] = {{1, 1, 1}, {1, 140, 70}, {2, 65, 33}, {3, 130, 16}, {5, 17, 7}, {15, 33, 129},
                               {29, 47, 64}, {121, 20, 9}, {3, 9, 512}, {2, 5, 1024}, {300, 14, 19}};
  for (const auto& [rows, n, k] : shapes) {
    about = set_name + stored + "products " + std::to_string(rows) + " " + std::to_string(n) + " " +
            std::to_string(k);
    for (uint32_t threshold : {0, 6554})
      for (bool gated : {false, true}) {
        linear<S>(rows, n, k, gated, Act::RELU, gated, threshold);
        linear<S>(rows, n, k, !gated, Act::GELU, gated, threshold);
      }
    linear<S>(rows, n, k, true, Act::NONE, false, 0);
    weight_gradient<S>(rows, n, k);
  }
}

void masks() {
  for (int blocks : {1, 3, 16, 37}) {
    std::vector<uint8_t> bytes(5 * blocks);
    fasttx_keep(bytes.data(), 11, 5, 2, blocks, 3, 4, SEED, 30000);
    for (int i = 0; i < 5 * blocks; i++)
      for (int k = 0; k < 8; k++)
        if ((bytes[i] >> k & 1) != (factor(30000, (2 + i % blocks) * 8 + k, 11 + i / blocks, 3, 4) > 0)) {
          printf("%s: a bit of the mask is wrong\n", about.c_str());
          exit(1);
        }
    checks++;
  }
}

}  // namespace

#include "encoder_checks.h"

int main() {
  for (const Kernels* const* set = supported(); *set; set++) {
    set_name = (*set)->name;
    fasttx_choose(set_name.c_str());
    checks = 0;
    about = set_name + " masks";
    masks();
    about = set_name + " rounding";
    rounding();
    every_operation<float>();
    every_operation<Bf16>();
    encoders();
    printf("%s: %d checks\n", set_name.c_str(), checks);
  }
}
