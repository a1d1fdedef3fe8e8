// What memory_on_host.hpp declares, and what wgmma_on_host.cpp asks of it besides.
#include "memory_on_host.hpp"

#include <unordered_map>

namespace memory {

int faults;
unsigned in_vain, in_vain_end;

// Those who act, of a block of T threads: threads, the copies of each, the products of each warp, its bulk copies.
static int threads, warps, actors;
static int copies_of(int thread) { return threads + thread; }
static int products_of(int thread) { return 2 * threads + thread / 32; }
static int bulk_of(int thread) { return 2 * threads + warps + thread / 32; }

static void join(unsigned* __restrict into, const unsigned* __restrict from, int count) {
  for (int i = 0; i < count; ++i) into[i] = from[i] > into[i] ? from[i] : into[i];
}

// Both clocks, one after the other: up to when what an actor did is seen, and is before a proxy fence.
struct Clocks {
  std::vector<unsigned> at;
  void start() { at.assign(2 * actors, 0); }
  unsigned& seen(int actor) { return at[actor]; }
  unsigned& fenced(int actor) { return at[actors + actor]; }
  void take(const Clocks& other) { join(at.data(), other.at.data(), 2 * actors); }
};
static Clocks of_thread[host::kMostThreads];
static unsigned copies_begun[host::kMostThreads];  // of each thread: the clock of copies that are not announced yet

struct Meeting {
  Clocks gathered, complete;
};
static std::unordered_map<const void*, Meeting> meetings;

struct Access {
  unsigned clock, actor;  // nobody: 0, 0, which all have seen
};
// Of each word: who wrote it and whether by a bulk copy, who has read it, when it was last written. Readers are the
// last generic and the last asynchronous one of each warpgroup.
constexpr int kMostWords = 256 * 1024 / 4, kMostReaders = 2 * host::kMostThreads / 128;
static Access writers[kMostWords], readers[kMostReaders][kMostWords];
static bool by_copies[kMostWords];
static unsigned times[kMostWords];
static int readers_here;
static unsigned words_here;
// The last write to each 1024 bytes: products need not read again what has not changed.
constexpr unsigned kPart = 1024;
static unsigned times_of_parts[kMostWords * 4 / kPart];
static unsigned now;

static const char* actor_name(int actor) {
  static char name[64];
  const int warp = (actor - 2 * threads) % (warps ? warps : 1);
  if (actor < 0) return "nobody";
  if (actor < threads) {
    std::snprintf(name, sizeof(name), "thread %d", actor);
  } else if (actor < 2 * threads) {
    std::snprintf(name, sizeof(name), "copies of thread %d", actor - threads);
  } else {
    std::snprintf(name, sizeof(name), "%s of warp %d", actor < 2 * threads + warps ? "products" : "bulk copies", warp);
  }
  return name;
}

__attribute__((noinline)) static void say(const char* what, unsigned address, int other) {
  static int said = 0;
  if (++said > 8) return;
  std::fprintf(stderr, "memory: block %u, thread %d: %s (byte %u, %s)\n", blockIdx.x, host::current, what, address,
               actor_name(other));
}

__attribute__((noinline)) static void fault(const char* what, unsigned address, int other) {
  ++faults;
  say(what, address, other);
}

static inline unsigned word_at(unsigned address) {
  if (address / 4 < words_here) return address / 4;
  std::fprintf(stderr, "memory: byte %u lies beyond shared memory\n", address), std::abort();
}
static inline unsigned time_of(unsigned address) { return times[word_at(address)]; }
static inline void stamp(unsigned word) { times[word] = times_of_parts[word * 4 / kPart] = ++now; }

static inline Clocks& mine() { return of_thread[host::current]; }

// What this thread does from here on is not part of what it has handed on or fenced.
static void tick() { ++mine().seen(host::current); }

static Meeting& meeting(const void* place) {
  Meeting& found = meetings[place];
  if (found.gathered.at.empty()) found.gathered.start(), found.complete.start();
  return found;
}

void release(const void* place, bool last) {
  Meeting& at = meeting(place);
  at.gathered.take(mine());
  tick();
  if (last) at.complete.at = at.gathered.at;
}
void acquire(const void* place) { mine().take(meeting(place).complete); }
// Something that acts for a thread arrives: only what it did itself is handed on.
static void release_by(int actor, unsigned clock, bool fenced, const void* place, bool last) {
  Meeting& at = meeting(place);
  at.gathered.seen(actor) = clock;
  if (fenced) at.gathered.fenced(actor) = clock;
  if (last) at.complete.at = at.gathered.at;
}

void proxy_fence() {
  Clocks& clocks = mine();
  join(&clocks.fenced(0), &clocks.seen(0), actors);
  tick();
}

// What this thread has seen, looked at from one place.
struct Sight {
  const unsigned* clocks = mine().at.data();
  bool saw(Access access) const { return clocks[access.actor] >= access.clock; }
  bool fenced(Access access) const { return clocks[actors + access.actor] >= access.clock; }
  // An asynchronous reader or writer sees what its own proxy did, in order, and else what is fenced.
  bool visible(Access access, bool asynchronous_access) const {
    return saw(access) && (asynchronous_access || fenced(access));
  }
};
static inline bool of_products(Access access) {
  return (int)access.actor >= 2 * threads && (int)access.actor < 2 * threads + warps;
}

static inline Access* readers_like_me(bool asynchronous) { return readers[host::current / 128 * 2 + asynchronous]; }

void read(unsigned address, int bytes) {
  const Sight sight;
  const Access me = {sight.clocks[host::current], (unsigned)host::current};
  Access* const noted = readers_like_me(false);
  for (unsigned a = address; a < address + bytes; a += 4) {
    const unsigned word = word_at(a);
    if (!sight.saw(writers[word])) fault("reads what is not announced", a, writers[word].actor);
    noted[word] = me;
  }
}

// Is what lies in these words done with, for those who overwrite it?
static void may_overwrite(unsigned address, int bytes, bool asynchronous, bool same = false) {
  const Sight sight;
  for (unsigned a = address; a < address + bytes; a += 4) {
    const unsigned word = word_at(a);
    for (int i = 0; i < readers_here; ++i) {
      const Access reader = readers[i][word];
      const bool done = asynchronous ? sight.visible(reader, i % 2) : sight.saw(reader);
      if (done || (of_products(reader) && in_vain <= a && a < in_vain_end)) continue;
      fault("overwrites what is read", a, reader.actor);
    }
    const Access writer = writers[word];
    const bool seen = asynchronous ? sight.visible(writer, by_copies[word]) : sight.saw(writer);
    if (!seen && !same) fault("overwrites what is not announced", a, writer.actor);
  }
}

static void note_writer(unsigned address, int bytes, int actor, unsigned clock, bool bulk) {
  for (unsigned a = address; a < address + bytes; a += 4) {
    const unsigned word = word_at(a);
    writers[word] = {clock, (unsigned)actor};
    by_copies[word] = bulk;
    stamp(word);
  }
}

void write(unsigned address, const void* bytes, int count) {
  for (int i = 0; i < count; i += 4) {
    // Lanes that write the same do not disturb each other.
    const unsigned at = address + i;
    const bool same = std::memcmp(dynamic_shared + at, (const char*)bytes + i, 4) == 0;
    may_overwrite(at, 4, false, same);
    if (same && !Sight().saw(writers[word_at(at)])) continue;
    note_writer(at, 4, host::current, mine().seen(host::current), false);
  }
  std::memcpy(dynamic_shared + address, bytes, count);
}

__attribute__((noinline)) static bool say_unseen(unsigned address, bool announced, int writer) {
  say(announced ? "reads what no proxy fence lies before" : "reads what is not announced", address, writer);
  return false;
}

// What the asynchronous proxy is about to read, for `actor`; false, and said, if it might not see it.
static inline bool read_asynchronously(unsigned address, int bytes, int actor, unsigned clock) {
  const Sight sight;
  Access* const noted = readers_like_me(true);
  bool all = true;
  for (unsigned a = address; a < address + bytes; a += 4) {
    const unsigned word = word_at(a);
    const Access writer = writers[word];
    noted[word] = {clock, (unsigned)actor};
    if (!sight.visible(writer, by_copies[word])) all = say_unseen(a, sight.saw(writer), writer.actor);
  }
  return all;
}

void exchange_within_warp() {
  const unsigned long long* seen = host::exchange_all(mine().seen(host::current));
  const int first = host::current / 32 * 32;
  for (int i = 0; i < 32; ++i) mine().seen(first + i) = std::max(mine().seen(first + i), (unsigned)seen[i]);
  tick();
}

void start_block(int count, int shared_bytes) {
  threads = count, warps = (count + 31) / 32, actors = 2 * threads + 2 * warps;
  for (int i = 0; i < threads; ++i) of_thread[i].start(), of_thread[i].seen(i) = 1;
  std::fill(copies_begun, copies_begun + threads, 1);
  meetings.clear();
  words_here = std::min(shared_bytes / 4 + 1, kMostWords);
  readers_here = 2 * ((threads + 127) / 128);
  std::fill(writers, writers + words_here, Access());
  for (int i = 0; i < readers_here; ++i) std::fill(readers[i], readers[i] + words_here, Access());
  std::fill(by_copies, by_copies + words_here, false);
  std::fill(times, times + words_here, 0);
  host::told = release;
  host::heard = acquire;
}

}  // namespace memory
