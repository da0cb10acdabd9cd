// A kernel that goes wrong. CARD_FAULT="HOW KERNEL": those whose names begin with KERNEL do nothing (skip), reach outside the card's memory
// (break), or end the program (die).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

enum class Fault { none, skip, breaks };

inline Fault fault_of(const std::string &kernel) {
    static const char *setting = getenv("CARD_FAULT");
    char how[16] = "", begins[100] = "";
    if (!setting || sscanf(setting, "%15s %99s", how, begins) != 2 || kernel.rfind(begins, 0) != 0) return Fault::none;
    if (*how == 'd') abort();
    return *how == 's' ? Fault::skip : Fault::breaks;
}
