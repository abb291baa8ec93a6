/* A switch whose ports are TAP devices and which forwards every frame after a fixed delay.
 *
 *   forwarder DELAY_US TAP...      prints "ready" when the devices exist; a line on stdin sets a new delay;
 *                                  exits when stdin closes.
 *
 * For kernels without sch_netem. Port i has the address 02:00:00:00:00:i (hexadecimal, from 1); frames to other
 * destinations are flooded. Frames keep the offload header, so TCP segments of up to 64 KiB pass as one frame.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PORTS = 64, HEADER = 10, FRAME = HEADER + 14 + 65536 + 64, BATCH = 32 };

struct frame {
    struct frame *next;
    int64_t due_ns;
    int from;
    size_t length;
    unsigned char bytes[];
};

static int ports[MAX_PORTS];
static int num_ports;
static long lost;
/* Frames in order of arrival, which is the order of their due times as long as the delay does not shrink. */
static struct frame *first, **last = &first;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int open_tap(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (tap < 0) return -1;
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(tap, TUNSETIFF, &request) < 0) return -1;
    if (ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) < 0) return -1;
    return tap;
}

static void receive(int port, int64_t delay_ns) {
    static unsigned char buffer[FRAME];
    for (int i = 0; i < BATCH; i++) {
        ssize_t length = read(ports[port], buffer, sizeof buffer);
        if (length < HEADER + 14) return;
        struct frame *frame = malloc(sizeof *frame + (size_t)length);
        if (!frame) return; /* the frame is lost; TCP retransmits it */
        frame->next = NULL;
        frame->due_ns = now_ns() + delay_ns;
        frame->from = port;
        frame->length = (size_t)length;
        memcpy(frame->bytes, buffer, (size_t)length);
        *last = frame;
        last = &frame->next;
    }
}

static void forward(const struct frame *frame) {
    static const unsigned char prefix[5] = {2, 0, 0, 0, 0};
    const unsigned char *to = frame->bytes + HEADER;
    int known = memcmp(to, prefix, 5) == 0 && to[5] >= 1 && to[5] <= num_ports;
    for (int port = 0; port < num_ports; port++)
        if (known ? port == to[5] - 1 : port != frame->from)
            if (write(ports[port], frame->bytes, frame->length) < 0) lost++; /* the port is not up yet, or its queue is full */
}

static void deliver_due(void) {
    while (first && first->due_ns <= now_ns()) {
        struct frame *frame = first;
        first = frame->next;
        if (!first) last = &first;
        forward(frame);
        free(frame);
    }
}

int main(int argc, char **argv) {
    if (argc < 3 || argc - 2 > MAX_PORTS) return fprintf(stderr, "usage: forwarder DELAY_US TAP...\n"), 2;
    int64_t delay_ns = atoll(argv[1]) * 1000;
    num_ports = argc - 2;
    struct pollfd polled[MAX_PORTS + 1];
    for (int port = 0; port < num_ports; port++) {
        ports[port] = open_tap(argv[port + 2]);
        if (ports[port] < 0) return perror(argv[port + 2]), 1;
        polled[port] = (struct pollfd){.fd = ports[port], .events = POLLIN};
    }
    polled[num_ports] = (struct pollfd){.fd = 0, .events = POLLIN};
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        /* ppoll, unlike poll, has a timeout in nanoseconds: delays are well below a millisecond. */
        int64_t wait_ns = first ? first->due_ns - now_ns() : 1000000000;
        if (wait_ns < 0) wait_ns = 0;
        struct timespec wait = {wait_ns / 1000000000, wait_ns % 1000000000};
        if (ppoll(polled, (nfds_t)num_ports + 1, &wait, NULL) < 0 && errno != EINTR) return perror("poll"), 1;
        if (polled[num_ports].revents) {
            char line[32];
            ssize_t length = read(0, line, sizeof line - 1);
            if (length <= 0) return fprintf(stderr, "forwarder: %ld frames lost\n", lost), 0;
            line[length] = 0;
            delay_ns = atoll(line) * 1000;
        }
        deliver_due(); /* before reading, so that a burst of new frames does not hold up frames that are due */
        for (int port = 0; port < num_ports; port++)
            if (polled[port].revents & POLLIN) receive(port, delay_ns);
        deliver_due();
    }
}
