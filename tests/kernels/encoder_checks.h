// The encoder of kernels/cpu against plain loops in double precision; part of cpu_driver.cpp.
#pragma once
#include "encoder.cpp"

namespace {

struct Sizes {
  int64_t d, heads, d_ff, layers, classes;
  bool gelu;
};

// Blocks of exactly their size, so that a sanitizer sees one element too many.
struct RandomWeights {
  Sizes s;
  int64_t words = 7, places = 33;
  std::vector<Floats> kept;
  std::vector<BlockWeights> blocks;
  EncoderWeights all = {};

  const float* tensor(int64_t count, float scale, float shift = 0) {
    kept.push_back(normals(count));
    for (float& x : kept.back()) x = x * scale + shift;
    return kept.back().data();
  }
  NormWeights norm() { return {tensor(s.d, 0.1f, 1), tensor(s.d, 0.1f), 1e-5f}; }
  LinearWeights linear(int64_t out, int64_t in) {
    return {tensor(out * in, 1 / sqrtf((float)in)), tensor(out, 0.1f)};
  }

  explicit RandomWeights(const Sizes& sizes) : s(sizes) {
    kept.reserve(100);
    for (int64_t i = 0; i < s.layers; i++) {
      BlockWeights b;
      b.norm1 = norm(), b.norm2 = norm();
      b.qkv = linear(3 * s.d, s.d), b.out = linear(s.d, s.d);
      b.up = linear(s.d_ff, s.d), b.down = linear(s.d, s.d_ff);
      blocks.push_back(b);
    }
    all.d_model = s.d, all.embedding_width = s.d, all.heads = s.heads, all.d_ff = s.d_ff, all.layers = s.layers;
    all.vocabulary = words, all.places = places, all.classes = s.classes, all.gelu = s.gelu;
    all.embedding_scale = 2;
    all.embedding = tensor(words * s.d, 0.5f), all.positions = tensor(places * s.d, 0.5f);
    all.blocks = blocks.data();
    all.norm = norm(), all.dense = linear(s.d, s.d), all.classify = linear(s.classes, s.d);
  }
};

double gelu(double x) { return x * 0.5 * erfc(-x / sqrt(2.0)); }

// Rows (count, in) through a linear layer.
Doubles applied(const LinearWeights& l, const Doubles& x, int64_t out, int64_t in) {
  const int64_t rows = x.size() / in;
  Doubles y(rows * out);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t o = 0; o < out; o++) {
      double sum = l.bias[o];
      for (int64_t i = 0; i < in; i++) sum += (double)l.weight[o * in + i] * x[r * in + i];
      y[r * out + o] = sum;
    }
  return y;
}

Doubles normed(const NormWeights& n, const Doubles& x, int64_t d) {
  Doubles y(x.size());
  for (size_t at = 0; at < x.size(); at += d) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < d; c++) mean += x[at + c] / d;
    for (int64_t c = 0; c < d; c++) variance += pow(x[at + c] - mean, 2) / d;
    for (int64_t c = 0; c < d; c++)
      y[at + c] = (x[at + c] - mean) / sqrt(variance + n.eps) * n.gamma[c] + n.beta[c];
  }
  return y;
}

Doubles logits_of_text(const RandomWeights& w, const int32_t* ids, int64_t length) {
  const Sizes& s = w.s;
  const int64_t d = s.d, dim = d / s.heads;
  Doubles h(length * d);
  for (int64_t r = 0; r < length; r++)
    for (int64_t c = 0; c < d; c++)
      h[r * d + c] = (double)w.all.embedding[ids[r] * d + c] * w.all.embedding_scale +
                     w.all.positions[r * d + c];
  for (const BlockWeights& b : w.blocks) {
    const Doubles qkv = applied(b.qkv, normed(b.norm1, h, d), 3 * d, d);
    Doubles mixed(length * d);
    for (int64_t head = 0; head < s.heads; head++)
      for (int64_t i = 0; i < length; i++) {
        Doubles p(length);
        double total = 0;
        for (int64_t j = 0; j < length; j++) {
          double score = 0;
          for (int64_t c = 0; c < dim; c++)
            score += qkv[i * 3 * d + head * dim + c] * qkv[j * 3 * d + d + head * dim + c];
          total += p[j] = exp(score / sqrt((double)dim));
        }
        for (int64_t j = 0; j < length; j++)
          for (int64_t c = 0; c < dim; c++)
            mixed[i * d + head * dim + c] += p[j] / total * qkv[j * 3 * d + 2 * d + head * dim + c];
      }
    const Doubles out = applied(b.out, mixed, d, d);
    for (size_t i = 0; i < h.size(); i++) h[i] += out[i];
    Doubles u = applied(b.up, normed(b.norm2, h, d), s.d_ff, d);
    for (double& x : u) x = s.gelu ? gelu(x) : std::max(x, 0.0);
    const Doubles down = applied(b.down, u, d, s.d_ff);
    for (size_t i = 0; i < h.size(); i++) h[i] += down[i];
  }
  const Doubles n = normed(w.all.norm, h, d);
  Doubles pooled(d);
  for (int64_t r = 0; r < length; r++)
    for (int64_t c = 0; c < d; c++) pooled[c] += n[r * d + c] / length;
  Doubles hidden = applied(w.all.dense, pooled, d, d);
  for (double& x : hidden) x = gelu(x);
  return applied(w.all.classify, hidden, s.classes, d);
}

// Texts of these lengths in one call, cut up in every way.
void encode(const Sizes& sizes, const std::vector<int64_t>& lengths, Precision precision) {
  if (!fasttx_encoder_offers((int)precision)) return;
  const RandomWeights w(sizes);
  std::vector<int64_t> offsets = {0};
  for (int64_t n : lengths) offsets.push_back(offsets.back() + n);
  std::vector<int32_t> ids(offsets.back());
  for (int32_t& id : ids) id = (int32_t)(engine() % w.words);
  Doubles expected;
  for (size_t b = 0; b < lengths.size(); b++)
    for (double x : logits_of_text(w, ids.data() + offsets[b], lengths[b])) expected.push_back(x);

  void* model = nullptr;
  apart([&] { return fasttx_encoder_create(&w.all, (int)precision, &model); });
  Floats first;
  for (int split : {1, 2, 0})
    for (int threads : {1, 2, 3}) {
      Floats logits = unwritten(expected.size());
      apart([&] {
        return fasttx_encoder_forward(model, ids.data(), offsets.data(), lengths.size(), logits.data(), split,
                                      threads);
      });
      if (first.empty()) first = logits;
      if (memcmp(first.data(), logits.data(), 4 * logits.size())) {
        printf("%s: other bits by split %d on %d threads\n", about.c_str(), split, threads);
        exit(1);
      }
    }
  fasttx_encoder_destroy(model);
  if (precision == Precision::FP32) return compare("logits", first, expected);
  for (size_t i = 0; i < first.size(); i++)
    if (!(fabs(first[i] - expected[i]) < 0.15)) {
      printf("%s: logit %zu is %g, not %g\n", about.c_str(), i, first[i], expected[i]);
      exit(1);
    }
  checks++;
}

void encoders() {
  engine.seed(1);
  for (Precision precision : {Precision::FP32, Precision::BF16, Precision::INT8})
    for (const Sizes& s : {Sizes{18, 3, 7, 2, 5, true}, {40, 1, 33, 1, 2, false}, {64, 2, 130, 1, 17, true},
                           {6, 6, 1, 1, 40, false}, {130, 1, 20, 1, 1, false}, {8, 2, 1, 0, 3, false}})
      for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{1}, {0, 3, 33, 0, 17}}) {
        about = set_name + " encoder in precision " + std::to_string((int)precision) + ", d_model " +
                std::to_string(s.d) + ", " + std::to_string(lengths.size()) + " texts";
        encode(s, lengths, precision);
      }
}

}  // namespace
