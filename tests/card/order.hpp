// Which work on the card is known to come after which. Streams run beside each other: two uses of the same memory, one of them a write, are
// in order only on one stream, through an event that was waited for, or because the program waited for the one before it asked for the
// other. Here what is not in order is an error each time; on a card it is wrong now and then. The program's threads count as one: what one of
// them waited for all are taken to know.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

// How much of each stream's work is done.
struct Clock {
    std::map<const void *, uint64_t> times;

    void join(const Clock &other) {
        for (auto &[stream, time] : other.times) times[stream] = std::max(times[stream], time);
    }
    bool has(const void *stream, uint64_t time) const {
        auto known = times.find(stream);
        return known != times.end() && known->second >= time;
    }
};

struct Moment { const void *stream; uint64_t time; };

// What was last done with some memory.
struct Uses {
    Moment written{nullptr, 0};
    std::map<const void *, uint64_t> read;
};

class Order {
    std::map<const void *, Clock> streams;
    Clock program; // what it has waited for

  public:
    // The next work of a stream. What the program has waited for comes before it.
    Moment next(const void *stream) {
        Clock &clock = streams[stream];
        clock.join(program);
        return {stream, ++clock.times[stream]};
    }
    // Notes a use. Whether it comes after all that it must not run beside.
    bool use(Uses &memory, Moment now, bool writing) {
        const Clock &known = streams[now.stream];
        bool after = memory.written.time == 0 || known.has(memory.written.stream, memory.written.time);
        if (writing)
            for (auto &[stream, time] : memory.read) after &= known.has(stream, time);
        if (writing) memory.written = now, memory.read.clear();
        else memory.read[now.stream] = now.time;
        return after;
    }
    // All that a stream was asked for so far.
    const Clock &of(const void *stream) { return streams[stream]; }
    void wait(const void *stream, const Clock &clock) { streams[stream].join(clock); }
    void program_waits(const Clock &clock) { program.join(clock); }
    void program_waits_for_all() {
        for (auto &[_, clock] : streams) program.join(clock);
    }
    bool program_knows(Moment moment) const { return program.has(moment.stream, moment.time); }
};
