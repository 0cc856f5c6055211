// The kernels of one instruction set; compiled once for each, with that set's flags.
// It includes no part of the C++ library that has code: the linker keeps one copy of such a
// function, and it might be the one for a set that this machine lacks.
#include "add_norm.h"
#include "attention.h"
#include "bias_act.h"
#include "embed.h"
#include "encoder.h"
#include "products.h"

#define NAMED_(prefix, isa) prefix##isa
#define NAMED(prefix, isa) NAMED_(prefix, isa)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

namespace FASTTX_ISA {

static void keep(uint8_t* out, uint64_t row0, int rows, uint64_t block0, int blocks, uint64_t head,
                 uint64_t sequence, const Dropout& dropout) {
  draw_keep(out, row0, rows, block0, blocks, head, sequence, Philox(dropout.seed), dropout.threshold);
}

template <class S>
constexpr StorageKernels<S> storage_kernels() {
  return {attention_forward<S>, attention_backward<S>, add_norm_forward<S>,
          add_norm_backward<S>, bias_act_forward<S>,   bias_act_backward<S>,
          pack_panel<typename Unit<S>::Type>, linear_forward<S>, weight_gradient<S>,
          Unit<S>::Type::PER};
}

}  // namespace FASTTX_ISA

static const EncoderKernels NAMED(encoder_, FASTTX_ISA) = {
    FASTTX_ISA::encoder_offers, FASTTX_ISA::encoder_model_bytes, FASTTX_ISA::encoder_pack,
    FASTTX_ISA::encoder_call_bytes, FASTTX_ISA::encoder_start, FASTTX_ISA::encoder_run,
};

extern const Kernels NAMED(fasttx_kernels_, FASTTX_ISA);
const Kernels NAMED(fasttx_kernels_, FASTTX_ISA) = {
    TEXT(FASTTX_ISA),
    FASTTX_ISA::GN,
    FASTTX_ISA::storage_kernels<float>(),
    FASTTX_ISA::storage_kernels<Bf16>(),
    FASTTX_ISA::attention_scratch,
    FASTTX_ISA::row_scratch,
    FASTTX_ISA::product_scratch,
    FASTTX_ISA::gradient_scratch,
    FASTTX_ISA::product_rows,
    FASTTX_ISA::embed_forward,
    FASTTX_ISA::embed_backward,
    FASTTX_ISA::keep,
    &NAMED(encoder_, FASTTX_ISA),
};
