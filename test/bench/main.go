// Command bench measures etcd-kms-proxy beside its alternatives in one run: etcd itself, etcd's grpc-proxy and a plain TCP proxy.
//
//	go run . [-short] [-json] [-rounds N] [-duration D] [-rows REGEXP] [-subjects A,B] [-bin DIR]
//
// All subjects stand before one etcd without fsync, on loopback and in cleartext. Each row is measured in rounds, the subjects in turns within a
// round, and the best round counts: on a machine that does other things too, only the least disturbed one says something. Absolute numbers
// are this machine's; the ratios between subjects are what to compare.
//
// It needs Linux, and the binaries that `make build tools-etcd` puts into the folder .bin.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Exit codes.
const (
	exitUsage   = 2
	exitFailure = 3
)

func main() {
	relayIfAsked()
	os.Exit(command(os.Args[1:]))
}

// command measures, prints the report and returns the exit code.
func command(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cfg, asJSON, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		return exitUsage
	}
	report, err := run(ctx, cfg)
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		return exitFailure
	}
	if asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		err = e.Encode(report)
	} else {
		err = report.print(os.Stdout)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: write report: %v\n", err)
		return exitFailure
	}
	return 0
}

// config says what to measure.
type config struct {
	BinDir   string        // where the binaries are
	Subjects []string      // some of subjectNames
	Rows     string        // a regular expression for the names of rows; "" is all
	Rounds   int           // how often each row is measured for each subject
	Duration time.Duration // of one measurement, after a tenth of it to warm up
	Conns    int           // connections that the clients of a row share
	List     int           // values in the list
	Watchers int
	Progress io.Writer
}

func parse(args []string) (config, bool, error) {
	c := config{Progress: os.Stderr}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	short := flags.Bool("short", false, "a quick run to see that everything works; its figures mean little")
	asJSON := flags.Bool("json", false, "print the report as JSON")
	subjects := flags.String("subjects", strings.Join(subjectNames, ","), "what to measure")
	flags.StringVar(&c.BinDir, "bin", defaultBinDir(), "folder of the binaries")
	flags.StringVar(&c.Rows, "rows", "", "regular expression of the rows to measure")
	flags.IntVar(&c.Rounds, "rounds", 0, "rounds; 0 is 5, or 1 with -short")
	flags.DurationVar(&c.Duration, "duration", 0, "time of one measurement; 0 is 1s, or 100ms with -short")
	flags.IntVar(&c.Conns, "conns", 1, "connections that all clients of a row share")
	if err := flags.Parse(args); err != nil {
		return c, false, err
	}
	if flags.NArg() > 0 {
		return c, false, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	c.Subjects = strings.Split(*subjects, ",")
	for _, s := range c.Subjects {
		if !slices.Contains(subjectNames, s) {
			return c, false, fmt.Errorf("-subjects: %q is none of %s", s, strings.Join(subjectNames, ", "))
		}
	}
	if _, err := regexp.Compile(c.Rows); err != nil {
		return c, false, fmt.Errorf("-rows: %w", err)
	}
	c.List, c.Watchers = 10000, 1000
	rounds, duration := 5, time.Second
	if *short {
		c.List, c.Watchers = 500, 50
		rounds, duration = 1, 100*time.Millisecond
	}
	if c.Rounds == 0 {
		c.Rounds = rounds
	}
	if c.Duration == 0 {
		c.Duration = duration
	}
	if c.Rounds < 0 || c.Duration < 0 || c.Conns < 1 {
		return c, false, errors.New("-rounds and -duration are not negative, -conns is at least 1")
	}
	return c, *asJSON, nil
}

// defaultBinDir is the folder that the Makefile builds into.
func defaultBinDir() string {
	if dir := os.Getenv("ETCD_KMS_PROXY_BIN"); dir != "" {
		return dir
	}
	_, self, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(self), "..", "..", ".bin")
}
