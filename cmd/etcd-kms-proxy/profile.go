//go:build profile

package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"syscall"
)

// A build with the tag profile writes profiles to the folder PROFILE_DIR: SIGUSR1 starts a CPU
// profile, the next SIGUSR1 writes it and the profile of allocations. It is for `make profile` and
// not for production: profiles name code and sizes, and never hold values.
func init() {
	dir := os.Getenv("PROFILE_DIR")
	if dir == "" {
		return
	}
	runtime.MemProfileRate = 16 << 10
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	go func() {
		for {
			if err := profile(dir, signals); err != nil {
				fmt.Fprintf(os.Stderr, "error: profile: %v\n", err)
			}
		}
	}()
}

func profile(dir string, signals <-chan os.Signal) error {
	<-signals
	cpu, err := os.Create(filepath.Join(dir, "cpu.pprof"))
	if err != nil {
		return err
	}
	defer cpu.Close()
	if err := pprof.StartCPUProfile(cpu); err != nil {
		return err
	}
	<-signals
	pprof.StopCPUProfile()
	allocs, err := os.Create(filepath.Join(dir, "allocs.pprof"))
	if err != nil {
		return err
	}
	if err := pprof.Lookup("allocs").WriteTo(allocs, 0); err != nil {
		allocs.Close()
		return err
	}
	return allocs.Close()
}
