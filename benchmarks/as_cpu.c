/*
Runs a program as if the processor had fewer instructions: every CPUID is trapped and answered without them.

    cc -shared -fPIC -o ./as_cpu.so benchmarks/as_cpu.c -ldl
    AS_CPU=avx2 LD_PRELOAD=./as_cpu.so python benchmarks/speed.py

AS_CPU=avx2 hides AVX-512 and all that came with it or after it: VNNI, bf16, AMX. AS_CPU=avx512 leaves AVX-512 as it
first was (F, CD, BW, DQ, VL). Libraries that choose their kernels by CPUID (PyTorch, oneDNN, MKL, ONNX Runtime) then
choose as there; the speed is that of this processor with those kernels. Linux on x86-64, on a processor with CPUID
faulting.
*/

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

typedef int (*sigaction_function)(int, const struct sigaction *, struct sigaction *);
typedef void (*handler_function)(int);
typedef handler_function (*signal_function)(int, handler_function);

static int avx512;

static void hide(unsigned leaf, unsigned subleaf, unsigned *r) { /* r: EAX, EBX, ECX, EDX */
    if (leaf == 7 && subleaf == 0) {
        if (!avx512) r[1] &= ~(BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 F, DQ, CD, BW, VL */
        r[1] &= ~BIT(21); /* AVX-512 IFMA */
        r[2] &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        r[2] &= ~(BIT(8) | BIT(9) | BIT(10)); /* GFNI, VAES, VPCLMULQDQ */
        r[3] &= ~(BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* VP2INTERSECT, AVX-512 FP16, AMX */
    } else if (leaf == 7 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) { /* AVX-VNNI, bf16, AMX, AVX10 */
        memset(r, 0, 4 * sizeof *r);
    } else if (leaf == 0xd && subleaf == 0) { /* the registers of all these */
        r[0] &= ~(BIT(17) | BIT(18) | (avx512 ? 0 : BIT(5) | BIT(6) | BIT(7)));
    }
}

static void trapped(int number, siginfo_t *info, void *context) {
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)g[REG_RIP];
    unsigned r[4];
    if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) { /* a fault of the program's own */
        struct sigaction stock = {.sa_handler = SIG_DFL};
        ((sigaction_function)dlsym(RTLD_NEXT, "sigaction"))(number, &stock, NULL);
        return;
    }
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __asm__ volatile("cpuid"
                     : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3])
                     : "a"((unsigned)g[REG_RAX]), "c"((unsigned)g[REG_RCX]));
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    hide((unsigned)g[REG_RAX], (unsigned)g[REG_RCX], r);
    g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
    g[REG_RIP] += 2;
}

/* The program's own handlers, such as Python's faulthandler, which pytest turns on, would take the signal away. */
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
    return ((sigaction_function)dlsym(RTLD_NEXT, "sigaction"))(number, number == SIGSEGV ? NULL : new, old);
}

handler_function signal(int number, handler_function handler) {
    return number == SIGSEGV ? SIG_DFL : ((signal_function)dlsym(RTLD_NEXT, "signal"))(number, handler);
}

__attribute__((constructor)) static void start(void) {
    struct sigaction ours = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    const char *name = getenv("AS_CPU");
    if (!name || (strcmp(name, "avx2") && strcmp(name, "avx512"))) {
        fprintf(stderr, "AS_CPU must be avx2 or avx512. Got %s.\n", name ? name : "nothing");
        exit(2);
    }
    avx512 = !strcmp(name, "avx512");
    ((sigaction_function)dlsym(RTLD_NEXT, "sigaction"))(SIGSEGV, &ours, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        perror("AS_CPU needs Linux on x86-64 and a processor with CPUID faulting");
        exit(2);
    }
}
