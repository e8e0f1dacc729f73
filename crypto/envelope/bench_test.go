package envelope

import (
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"testing"
)

var sizes = []int{256, 1024, 10240}

func BenchmarkSeal(b *testing.B) {
	v := vectors()[0]
	f, _ := newFrame(b, &v)
	for _, n := range sizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			key, plaintext := v.EtcdKey, make([]byte, n)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := f.Seal(nil, key, plaintext); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	v := vectors()[0]
	f, seed := newFrame(b, &v)
	for _, n := range sizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			key := v.EtcdKey
			stored, err := f.Seal(nil, key, make([]byte, n))
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				_, object, _ := Split(stored)
				data, _, _ := Cut(object)
				if _, err := seed.Open(nil, key, data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOpenRecent opens one value again and again, as for the many watchers of one key.
func BenchmarkOpenRecent(b *testing.B) {
	v := vectors()[0]
	f, seed := newFrame(b, &v)
	stored, err := f.Seal(nil, v.EtcdKey, make([]byte, 1024))
	if err != nil {
		b.Fatal(err)
	}
	data := dataOf(b, stored)
	for name, recent := range map[string]*Recent{"derived": nil, "recent": new(Recent)} {
		b.Run(name, func(b *testing.B) {
			own := make([]byte, 0, len(data))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := seed.OpenRecent(recent, 0, own, v.EtcdKey, data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParse(b *testing.B) {
	v := vectors()[0]
	_, object, _ := Split(v.reference(b))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(object); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkExpand is what the kept HMAC states save: compare with BenchmarkOpen as a whole.
func BenchmarkExpand(b *testing.B) {
	seed, info := make([]byte, 32), string(make([]byte, 32))
	for b.Loop() {
		if _, err := hkdf.Expand(sha256.New, seed, info, 32); err != nil {
			b.Fatal(err)
		}
	}
}
