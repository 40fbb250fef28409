// Go's pool of pipes (internal/poll/splice_linux.go): pipes of 1 MiB in a sync.Pool, which the
// garbage collector empties through finalizers. Prints microseconds: making and closing, the pool.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
)

const setPipeSize = 1031 // F_SETPIPE_SZ, fcntl(2)

type pair struct{ fds [2]int }

func newPipe() *pair {
	p := new(pair)
	if err := syscall.Pipe2(p.fds[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK); err != nil {
		panic(err)
	}
	syscall.Syscall(syscall.SYS_FCNTL, uintptr(p.fds[0]), setPipeSize, 1<<20)
	return p
}

func destroy(p *pair) {
	runtime.SetFinalizer(p, nil)
	syscall.Close(p.fds[0])
	syscall.Close(p.fds[1])
}

var pool = sync.Pool{New: func() any {
	p := newPipe()
	runtime.SetFinalizer(p, destroy)
	return p
}}

func make_and_close() { destroy(newPipe()) }
func from_pool()      { pool.Put(pool.Get()) }

func microseconds(work func(), parallel bool) float64 {
	result := testing.Benchmark(func(b *testing.B) {
		if parallel {
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					work()
				}
			})
		} else {
			for i := 0; i < b.N; i++ {
				work()
			}
		}
	})
	return float64(result.T.Nanoseconds()) / float64(result.N) / 1000
}

func main() {
	testing.Init()
	flag.Set("test.benchtime", os.Args[1])
	found := map[string][2]float64{
		"one goroutine": {microseconds(make_and_close, false), microseconds(from_pool, false)},
		fmt.Sprintf("%d at once", runtime.GOMAXPROCS(0)): {
			microseconds(make_and_close, true), microseconds(from_pool, true)},
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{
		"version": runtime.Version()[2:], "microseconds": found})
}
