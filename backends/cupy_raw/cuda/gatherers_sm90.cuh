// The warpgroups that fetch blocks of rows, one or two, in turn, beside kWarpgroups that multiply;
// and how many registers a thread of either kind has. Include after gather_sm90.cuh,
// width_sm90.cuh, kWarpgroups and kTwoGatherRegisters (of a thread that fetches, where two do).
#pragma once

constexpr int kGatherers = SCFA_GATHERERS;
static_assert(kGatherers == 1 || kGatherers == 2, "they take turns");
constexpr int kAllGatherThreads = kGatherers * kGatherThreads;
constexpr int kThreads = 128 * (kGatherers + kWarpgroups);
// Two and two share 512. With one that fetches, where rows end inside the only panel, it takes
// more, and products fewer.
constexpr int kProducerRegisters = kGatherers == 2    ? kTwoGatherRegisters
                                   : kWarpgroups == 3 ? 32
                                   : kColumns < 64    ? 56
                                                      : 40;
constexpr int kConsumerRegisters = kGatherers == 2    ? 256 - kTwoGatherRegisters
                                   : kWarpgroups == 3 ? 160
                                   : kColumns < 64    ? 224
                                                      : 232;
static_assert(kGatherers * kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                  launched_registers(kThreads),
              "registers are shared out, not made");
