/* What the three stand-in libraries share: errors by text and counters of the kernels that were called. */
#ifndef EMULATED_H
#define EMULATED_H
int emulated_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
void emulated_count(const char *name);
void emulated_flush(void); /* carry out the copies to the host that were put off; before anything else touches memory */
#endif
