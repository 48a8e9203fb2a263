/*
 * Copyright (c) The vmbackup.vma contributors
 * GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
 * SPDX-License-Identifier: GPL-3.0-or-later
 */

/*
 * Writes numbered blocks to disks, so that a copy of the disks tells whether it is of one instant.
 *
 * Write n, from 1, fills a 4 KiB block with the number n and is on the disk before the next begins. Writes go round the
 * disks, and on each disk round 64 places that are 1 MiB apart. check_instant.py knows the same order. Where the disks
 * have been written before, the numbers go on from there, as if there had been no reboot.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / sizeof(uint64_t), PLACES = 64, STRIDE = 1 << 20, MAX_DISKS = 8 };

/* The order of addresses would hide a race with whoever reads in that order, too; so the places' bits are reversed. */
static unsigned scatter(unsigned place)
{
    unsigned scattered = 0;
    for (unsigned bit = 1; bit < PLACES; bit <<= 1) {
        scattered = scattered << 1 | (place & 1);
        place >>= 1;
    }
    return scattered;
}

static void fail(const char *what, const char *which)
{
    fprintf(stderr, "writer: cannot %s %s: %s\n", what, which, strerror(errno));
    exit(1);
}

int main(int argc, char **argv)
{
    unsigned disks = argc > 3 ? (unsigned)argc - 3 : 0;
    if (disks < 1 || disks > MAX_DISKS) {
        fprintf(stderr, "usage: writer COUNT PAUSE DISK...\n"
                        "COUNT writes, 0 for ever, with PAUSE microseconds after each\n");
        return 2;
    }
    uint64_t count = strtoull(argv[1], NULL, 10);
    useconds_t pause = (useconds_t)strtoul(argv[2], NULL, 10);

    int descriptors[MAX_DISKS];
    for (unsigned disk = 0; disk < disks; disk++) {
        descriptors[disk] = open(argv[3 + disk], O_RDWR | O_DIRECT | O_DSYNC);
        if (descriptors[disk] < 0)
            fail("open", argv[3 + disk]);
    }
    uint64_t *block = aligned_alloc(BLOCK, BLOCK);
    if (block == NULL)
        fail("allocate", "a block");

    uint64_t last = 0;
    for (unsigned disk = 0; disk < disks; disk++) {
        for (unsigned place = 0; place < PLACES; place++) {
            if (pread(descriptors[disk], block, BLOCK, (off_t)place * STRIDE) != BLOCK)
                fail("read from", argv[3 + disk]);
            if (block[0] > last)
                last = block[0];
        }
    }

    for (uint64_t number = last + 1; count == 0 || number <= last + count; number++) {
        unsigned disk = (unsigned)((number - 1) % disks);
        unsigned place = scatter((unsigned)((number - 1) / disks % PLACES));
        for (unsigned word = 0; word < WORDS; word++)
            block[word] = number;
        if (pwrite(descriptors[disk], block, BLOCK, (off_t)place * STRIDE) != BLOCK)
            fail("write to", argv[3 + disk]);
        if (number % (2 * PLACES * disks) == 0) {
            printf("WRITTEN %llu\n", (unsigned long long)number);
            fflush(stdout);
        }
        if (pause > 0)
            usleep(pause);
    }
    return 0;
}
