// Command bench measures etcd-kms-proxy next to its alternatives in one run: etcd itself, etcd's
// grpc-proxy, a TCP relay, haproxy if it is installed, and another build of etcd-kms-proxy.
//
//	go run . [-short] [-json] [-rounds N] [-duration D] [-rows REGEXP] [-subjects A,B]
//	         [-base BINARY] [-busy N] [-conns N] [-bin DIR] [-profile DIR]
//
// All subjects of a transport (cleartext or TLS) stand in front of one etcd without fsync, on
// loopback. Each row is measured in rounds, the subjects take turns within a round, and the report
// shows the median of the rounds. A ratio is the median of the ratios of each round, with its
// range. Absolute figures belong to one machine; compare the ratios.
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
	"os/exec"
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
	burnIfAsked()
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
	BinDir   string        // folder of the binaries
	Base     string        // another etcd-kms-proxy binary to compare with; "" for none
	Subjects []string      // some of subjectNames
	Rows     string        // a regular expression for the names of rows; "" is all
	Rounds   int           // how often each row is measured for each subject
	Duration time.Duration // of one measurement, after a tenth of it to warm up
	Conns    int           // most connections that the clients of a row share
	// folder for profiles of the last row that was measured on etcd-kms-proxy; "" for none
	Profile  string
	Busy     int // processes that only use CPU, to measure on a machine under load
	List     int // values in the list of small values
	Large    int // values of 1 MiB in the list of large values
	Watchers int // of one key
	Many     int // watchers, each of its own key
	Progress io.Writer
}

func parse(args []string) (c config, asJSON bool, err error) {
	c = config{Progress: os.Stderr}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	short := flags.Bool("short", false, "a quick run to see that everything works; its figures mean little")
	flags.BoolVar(&asJSON, "json", false, "print the report as JSON")
	subjects := flags.String("subjects", strings.Join(subjectNames, ","), "what to measure; haproxy is left out if it is not installed")
	flags.StringVar(&c.BinDir, "bin", defaultBinDir(), "folder of the binaries")
	flags.StringVar(&c.Rows, "rows", "", "regular expression of the rows to measure")
	flags.IntVar(&c.Rounds, "rounds", 0, "rounds; 0 is 5, or 1 with -short")
	flags.DurationVar(&c.Duration, "duration", 0, "time of one measurement; 0 is 1s, or 100ms with -short")
	flags.StringVar(&c.Base, "base", "", "another etcd-kms-proxy `BINARY` to compare with in the same run")
	flags.StringVar(&c.Profile, "profile", "", "write profiles of etcd-kms-proxy to `DIR`: one row, one subject, a build with the tag profile")
	flags.IntVar(&c.Conns, "conns", 8, "most connections that all clients of a row share")
	flags.IntVar(&c.Busy, "busy", 0, "processes that only use CPU while the rows are measured")
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
	c.List, c.Large, c.Watchers, c.Many = 10000, 100, 1000, 10000
	rounds, duration := 5, time.Second
	if *short {
		c.List, c.Large, c.Watchers, c.Many = 500, 3, 50, 100
		rounds, duration = 1, 100*time.Millisecond
	}
	if c.Rounds == 0 {
		c.Rounds = rounds
	}
	if c.Duration == 0 {
		c.Duration = duration
	}
	if c.Rounds < 0 || c.Duration < 0 || c.Busy < 0 || c.Conns < 1 {
		return c, false, errors.New("-rounds, -duration and -busy are not negative, -conns is at least 1")
	}
	if c.Profile != "" {
		if c.Profile, err = filepath.Abs(c.Profile); err != nil {
			return c, false, fmt.Errorf("-profile: %w", err)
		}
		if len(c.Subjects) != 1 || c.Subjects[0] != passing && c.Subjects[0] != encrypting {
			return c, false, fmt.Errorf("-profile: measure one subject, -subjects %s or -subjects %s", passing, encrypting)
		}
		c.Rounds = 1
	}
	if c.Base != "" {
		if c.Base, err = filepath.Abs(c.Base); err != nil {
			return c, false, fmt.Errorf("-base: %w", err)
		}
		c.Subjects = append(c.Subjects, basePassing, baseEncrypting)
	}
	if _, err := exec.LookPath("haproxy"); err != nil {
		c.Subjects = slices.DeleteFunc(c.Subjects, func(s string) bool { return s == haproxy })
	}
	return c, asJSON, nil
}

// defaultBinDir is the folder that the Makefile builds into.
func defaultBinDir() string {
	if dir := os.Getenv("ETCD_KMS_PROXY_BIN"); dir != "" {
		return dir
	}
	_, self, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(self), "..", "..", ".bin")
}
