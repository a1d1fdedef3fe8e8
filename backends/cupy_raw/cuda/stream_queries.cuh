// Query tiles streaming through shared memory: what a block of keys knows of the queries of its group.
#pragma once
#include "schedule.cuh"

template <int kRows>
struct QueryRows {
  int start[kRows], end[kRows];  // block_copy_rows fills the four in turn
  float lse_log2[kRows], delta[kRows];
};

struct Member {  // one query head of the group
  const Element *q, *dout;
  i64 list;          // where its sorted rows start in the plan
  QueryRange range;  // sorted rows that can see a key of this tile
};

// Walks the query tiles, kRows rows each, of all heads of the group.
template <int kRows>
struct Cursor {
  int member, row;  // which head of the group; first row of the tile

  SCFA_DEVICE void start(const Member* members, int count) {
    member = 0, row = members[0].range.first;
    skip_finished(members, count);
  }
  SCFA_DEVICE void advance(const Member* members, int count) {
    row += kRows;
    skip_finished(members, count);
  }
  SCFA_DEVICE void skip_finished(const Member* members, int count) {
    while (member < count && row >= members[member].range.last) {
      ++member;
      if (member < count) row = members[member].range.first;
    }
  }
};

// Four values a query row in the background, an equal share of the threads each; zeros from `valid` on.
template <int kThreads, int kRows>
SCFA_DEVICE void block_copy_rows(QueryRows<kRows>& rows, const Params& p, i64 list, int valid) {
  constexpr int kTeam = kThreads / 4;
  const u32 thread = thread_here(), kind = thread / kTeam;
  const int* statistics = reinterpret_cast<const int*>(kind == 2 ? p.row_lse : p.delta);
  const int* source = kind == 0 ? p.key_start : kind == 1 ? p.key_end : statistics;
  const u32 target = shared_address(rows.start) + kind * kRows * 4;
#pragma unroll
  for (int row = 0; row < kRows; row += kTeam) {
    const int item = row + int(thread % kTeam);
    if (kRows % kTeam != 0 && item >= kRows) break;
    copy4_async(target + 4 * item, source + list + (item < valid ? item : 0), item < valid);
  }
}
