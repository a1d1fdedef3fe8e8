// Who may see what of dynamic shared memory, when the sm_90a kernels run on the fibers of cuda_on_host.hpp: the order
// that barriers give, and the two proxies of the PTX ISA.
//
// Every thread has vector clocks of what it has seen of others and of what lies before a proxy fence; barriers hand
// both on. Whoever acts for a thread has a clock too: its copies, a warp's products, a warp's bulk copies. A word knows
// who wrote it and who has read it. What the kernel's barriers and fences leave without order is found, whichever way
// the fibers ran: writes that are read before they are announced, or by the asynchronous proxy with no fence between,
// and words that are overwritten while others may still read them.
#pragma once
namespace memory {

#if defined(__GNUC__) && !defined(__clang__)
#define SCFA_FAST __attribute__((optimize("O3")))
#else
#define SCFA_FAST
#endif

// Those who act, of a block of T threads: threads, the copies of each, the products of each warp, its bulk copies.
static int threads, warps, actors;
inline int copies_of(int thread) { return threads + thread; }
inline int products_of(int thread) { return 2 * threads + thread / 32; }
inline int bulk_of(int thread) { return 2 * threads + warps + thread / 32; }

SCFA_FAST inline void join(unsigned* into, const unsigned* from, int count) {
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
static std::vector<Clocks> of_thread;
static std::vector<unsigned> copies_begun;  // of each thread: the clock of copies that are not announced yet

struct Meeting {
  Clocks gathered, complete;
};
static std::unordered_map<const void*, Meeting> meetings;

struct Access {
  unsigned clock = 0;
  short actor = -1;
};
constexpr int kReaders = 12;  // the last generic and the last asynchronous one of each warpgroup
struct Word {
  Access writer, readers[kReaders];
  bool by_copies = false;  // by a bulk copy
};
static std::vector<Word> words;
static std::vector<unsigned> times;  // of each word: when it was last written
static unsigned now;
static int faults;
static unsigned in_vain, in_vain_end;  // where products may read, and forget, what others overwrite meanwhile

inline const char* actor_name(int actor) {
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

inline void say(const char* what, unsigned address, int other) {
  static int said = 0;
  if (++said > 8) return;
  std::fprintf(stderr, "memory: block %u, thread %d: %s (byte %u, %s)\n", blockIdx.x, host::current, what, address,
               actor_name(other));
}

inline void fault(const char* what, unsigned address, int other) {
  ++faults;
  say(what, address, other);
}

inline void make_room(unsigned address) {
  words.resize(address / 4 + 1024);
  times.resize(words.size());
}
SCFA_INLINE Word& word(unsigned address) {
  if (address / 4 >= words.size()) make_room(address);
  return words[address / 4];
}
SCFA_INLINE unsigned& time_of(unsigned address) {
  if (address / 4 >= times.size()) make_room(address);
  return times[address / 4];
}

SCFA_INLINE Clocks& mine() { return of_thread[host::current]; }

// What this thread does from here on is not part of what it has handed on or fenced.
inline void tick() { ++mine().seen(host::current); }

inline Meeting& meeting(const void* place) {
  Meeting& found = meetings[place];
  if (found.gathered.at.empty()) found.gathered.start(), found.complete.start();
  return found;
}

// Arrivals hand on what this thread has seen; `last` completes the phase that others wait for.
inline void release(const void* place, bool last) {
  Meeting& at = meeting(place);
  at.gathered.take(mine());
  tick();
  if (last) at.complete.at = at.gathered.at;
}
inline void acquire(const void* place) { mine().take(meeting(place).complete); }
// Something that acts for a thread arrives: only what it did itself is handed on.
inline void release_by(int actor, unsigned clock, bool fenced, const void* place, bool last) {
  Meeting& at = meeting(place);
  at.gathered.seen(actor) = clock;
  if (fenced) at.gathered.fenced(actor) = clock;
  if (last) at.complete.at = at.gathered.at;
}

inline void proxy_fence() {
  Clocks& clocks = mine();
  join(&clocks.fenced(0), &clocks.seen(0), actors);
  tick();
}

SCFA_INLINE bool saw(const Access& access) { return access.actor < 0 || mine().seen(access.actor) >= access.clock; }
SCFA_INLINE bool fenced(const Access& access) { return access.actor < 0 || mine().fenced(access.actor) >= access.clock; }
SCFA_INLINE bool of_products(const Access& access) {
  return access.actor >= 2 * threads && access.actor < 2 * threads + warps;
}

// An asynchronous reader or writer sees what its own proxy did, in order, and else what is fenced.
SCFA_INLINE bool visible(const Access& access, bool asynchronous_access) {
  return saw(access) && (asynchronous_access || fenced(access));
}

SCFA_INLINE void note_reader(Word& at, int actor, unsigned clock, bool asynchronous) {
  at.readers[host::current / 128 % (kReaders / 2) * 2 + asynchronous] = {clock, (short)actor};
}

SCFA_FAST inline void read(unsigned address, int bytes) {
  for (unsigned a = address; a < address + bytes; a += 4) {
    Word& at = word(a);
    if (!saw(at.writer)) fault("reads what is not announced", a, at.writer.actor);
    note_reader(at, host::current, mine().seen(host::current), false);
  }
}

// Is what lies here done with, for those who overwrite it?
SCFA_FAST inline void may_overwrite(unsigned address, bool asynchronous, bool same) {
  Word& at = word(address);
  for (int i = 0; i < kReaders; ++i) {
    const Access& reader = at.readers[i];
    if (of_products(reader) && in_vain <= address && address < in_vain_end) continue;
    const bool done = asynchronous ? visible(reader, i % 2) : saw(reader);
    if (!done) fault("overwrites what is read", address, reader.actor);
  }
  const bool seen = asynchronous ? visible(at.writer, at.by_copies) : saw(at.writer);
  if (!seen && !same) fault("overwrites what is not announced", address, at.writer.actor);
}

SCFA_INLINE void note_writer(unsigned address, int actor, unsigned clock, bool by_copies) {
  Word& at = word(address);
  at.writer = {clock, (short)actor};
  at.by_copies = by_copies;
  time_of(address) = ++now;
}

// A store of this thread.
SCFA_FAST inline void write(unsigned address, const void* bytes, int count) {
  for (int i = 0; i < count; i += 4) {
    // Lanes that write the same do not disturb each other.
    const unsigned at = address + i;
    const bool same = std::memcmp(dynamic_shared + at, (const char*)bytes + i, 4) == 0;
    may_overwrite(at, false, same);
    if (!same || saw(word(at).writer)) note_writer(at, host::current, mine().seen(host::current), false);
  }
  std::memcpy(dynamic_shared + address, bytes, count);
}

// What the asynchronous proxy is about to read, for `actor`; false, and said, if it might not see it.
SCFA_FAST inline bool read_asynchronously(unsigned address, int actor, unsigned clock) {
  Word& at = word(address);
  note_reader(at, actor, clock, true);
  if (visible(at.writer, at.by_copies)) return true;
  const bool announced = saw(at.writer);
  say(announced ? "reads what no proxy fence lies before" : "reads what is not announced", address, at.writer.actor);
  return false;
}

// Lanes that have one another's values, made of what each has read: all of that has been read.
inline void exchange_within_warp() {
  host::slots[host::current] = mine().seen(host::current);
  host::wait_warp();
  const int first = host::current / 32 * 32;
  for (int i = first; i < first + 32; ++i) mine().seen(i) = std::max(mine().seen(i), (unsigned)host::slots[i]);
  host::wait_warp();
  tick();
}

inline void start_block(int count, int shared_bytes) {
  threads = count, warps = (count + 31) / 32, actors = 2 * threads + 2 * warps;
  of_thread.resize(threads);
  for (int i = 0; i < threads; ++i) of_thread[i].start(), of_thread[i].seen(i) = 1;
  copies_begun.assign(threads, 1);
  meetings.clear();
  words.assign(shared_bytes / 4 + 1, Word());
  times.assign(words.size(), 0);
  host::told = release;
  host::heard = acquire;
}

}  // namespace memory
