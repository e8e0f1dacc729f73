package etcdfile

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// span is a part of a file, in bytes.
type span struct{ from, to int64 }

// spans are parts of a file, in order.
type spans []span

// contain reports whether an offset is in one of the spans.
func (s spans) contain(offset int64) bool {
	for _, x := range s { // few, because add merges adjacent spans
		if offset >= x.from && offset < x.to {
			return true
		}
	}
	return false
}

func (s *spans) add(x span) {
	if n := len(*s); n > 0 && (*s)[n-1].to == x.from {
		(*s)[n-1].to = x.to
		return
	}
	*s = append(*s, x)
}

// Types of records in etcd's write-ahead log (walpb) that are decoded here, and limits.
const (
	recordEntry = 2
	recordCRC   = 4
	maxRecord   = 512 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// log decodes a write-ahead log. Each frame is a length of 8 bytes, whose upper byte holds the size
// of the padding, and a walpb.Record with a CRC over all data so far. log returns the decoded
// spans. After the last valid record there are zeros, because etcd preallocates the file, or a
// record torn by a crash.
func (l *inspection) log(ctx context.Context, r io.Reader) spans {
	var decoded spans
	in, at := bufio.NewReaderSize(r, 1<<20), int64(0)
	defer func() {
		if at == 0 && !l.file.Damaged {
			l.damage("it holds no record")
		}
	}()
	sum, chained := uint32(0), false
	for ctx.Err() == nil {
		var head [8]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			if !errors.Is(err, io.EOF) {
				l.damage("it ends within a record at byte %d", at)
			}
			return decoded
		}
		field := binary.LittleEndian.Uint64(head[:])
		if field == 0 {
			return decoded // preallocated
		}
		length, pad := int64(field&(1<<56-1)), int64(0)
		if field>>63 == 1 {
			pad = int64(field >> 56 & 7)
		}
		if length > maxRecord || at+8+length+pad > l.file.Bytes {
			l.damage("the record at byte %d is torn: from there on the bytes were only searched", at)
			return decoded
		}
		frame := make([]byte, length+pad)
		if _, err := io.ReadFull(in, frame); err != nil {
			l.damage("it cannot be read at byte %d: %v", at, err)
			return decoded
		}
		var kind, crc uint64
		var data []byte
		ok := fields(frame[:length], func(n protowire.Number, v uint64, d []byte) {
			switch n {
			case 1:
				kind = v
			case 2:
				crc = v
			case 3:
				data = d
			}
		})
		if !ok {
			l.damage("the record at byte %d is damaged: from there on the bytes were only searched", at)
			return decoded
		}
		if kind == recordCRC { // each file begins with the checksum over the files before it
			sum, chained = uint32(crc), true
		} else if sum = crc32.Update(sum, castagnoli, data); chained && sum != uint32(crc) {
			l.damage("the checksum of the record at byte %d is wrong: from there on the bytes were only searched", at)
			return decoded
		}
		if kind != recordEntry || l.entry(data, at) {
			decoded.add(span{at, at + 8 + length + pad})
		}
		at += 8 + length + pad
	}
	return decoded
}

// entry decodes a raftpb.Entry. The data of an entry of the normal type is an InternalRaftRequest
// of etcd. It reports whether the data was decoded.
func (l *inspection) entry(entry []byte, at int64) bool {
	normal, data := true, []byte(nil)
	fields(entry, func(n protowire.Number, v uint64, d []byte) {
		switch n {
		case 1:
			normal = v == 0
		case 4:
			data = d
		}
	})
	if !normal {
		return true
	}
	var request pb.InternalRaftRequest
	if proto.Unmarshal(data, &request) != nil {
		l.damage("the request in the record at byte %d is not decoded: its bytes were only searched", at)
		return false
	}
	l.put(request.Put, at)
	l.txn(request.Txn, at)
	return true
}

// txn judges the values in both branches of a transaction and in its compares.
func (l *inspection) txn(request *pb.TxnRequest, at int64) {
	for _, c := range request.GetCompare() {
		if len(c.GetValue()) > 0 {
			l.judge(c.GetKey(), c.GetValue(), at)
		}
	}
	for _, op := range slices.Concat(request.GetSuccess(), request.GetFailure()) {
		l.put(op.GetRequestPut(), at)
		l.txn(op.GetRequestTxn(), at)
	}
}

// put judges the value of a put, unless the request leaves the value unchanged.
func (l *inspection) put(request *pb.PutRequest, at int64) {
	if request != nil && !request.GetIgnoreValue() {
		l.judge(request.GetKey(), request.GetValue(), at)
	}
}

func (l *inspection) judge(key, value []byte, at int64) {
	l.file.Values++
	if why := l.Judge(key, value, true); why != "" {
		l.found(Finding{Place: Log, Key: string(key), Offset: at, Why: why})
	}
}
