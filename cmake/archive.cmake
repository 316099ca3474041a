# What `cpack` packs: a folder that runs where it is unpacked, with all libraries but those of C and C++, which ask less of a machine when they
# are its own, and driver, cuBLASLt and MPI.
set(installed kava_bench)
foreach(source ${PROGRAM_SOURCES})
  get_filename_component(program ${source} NAME_WE)
  list(APPEND installed ${program})
endforeach()
if(TARGET kava_tests)
  list(APPEND installed kava_tests)
endif()
install(TARGETS ${installed} RUNTIME DESTINATION bin)
install(TARGETS kava_engine RUNTIME_DEPENDENCY_SET kava_libraries LIBRARY DESTINATION lib)
foreach(module kava_cuda kava_mpi)
  if(TARGET ${module})
    install(TARGETS ${module} LIBRARY DESTINATION lib)
  endif()
endforeach()
install(RUNTIME_DEPENDENCY_SET kava_libraries PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|dl|rt|pthread|gcc_s|stdc\\+\\+)\\.so" "^libkava_"
        LIBRARY DESTINATION lib)
install(DIRECTORY configs docs DESTINATION .)
install(DIRECTORY tests/golden DESTINATION tests)
install(PROGRAMS tools/export_metrics.py tools/fetch.sh tools/gpu_check.sh tools/parquet_to_jsonl.py tools/quickstart.sh DESTINATION tools)
install(FILES benchmarks/torch_reference.py DESTINATION benchmarks)
install(FILES README.md LICENSE CHANGELOG.md DESTINATION .)
# Of the code of others that is packed; where Debian's packages leave them.
foreach(package libcli11-dev libdnnl-dev libfmt-dev libgomp1 libpcre2-dev libssl-dev libtomlplusplus-dev libutf8proc-dev nlohmann-json3-dev
                ocl-icd-libopencl1)
  install(FILES /usr/share/doc/${package}/copyright DESTINATION licences RENAME ${package}.txt OPTIONAL)
endforeach()

# What the programs and docs/configuration.md say of themselves, as man pages and completion.
install(CODE "
  set(manual \"${CMAKE_BINARY_DIR}/manual\")
  file(REMOVE_RECURSE \"\${manual}\")
  execute_process(COMMAND \"${CMAKE_SOURCE_DIR}/tools/manual.sh\" \"${CMAKE_BINARY_DIR}/bin\" \"\${manual}\" COMMAND_ERROR_IS_FATAL ANY)
  set(share \"\${CMAKE_INSTALL_PREFIX}/share\")  # below DESTDIR, as file(INSTALL) has it
  file(INSTALL \"\${manual}/man1\" \"\${manual}/man5\" DESTINATION \"\${share}/man\")
  file(INSTALL \"\${manual}/bash-completion/kava\" DESTINATION \"\${share}/bash-completion/completions\")")
# A Debian package lies in a folder of its own, like the archive, with links from where a system looks.
install(SCRIPT ${CMAKE_SOURCE_DIR}/cmake/deb_links.cmake)

set(CPACK_GENERATOR TXZ)
set(CPACK_STRIP_FILES ON)
set(CPACK_PACKAGE_FILE_NAME kava-${PROJECT_VERSION}-linux-x86_64)
if(TARGET kava_kernels)
  string(APPEND CPACK_PACKAGE_FILE_NAME -cuda)
endif()
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "Trains and evaluates language models that reason in latents")
set(CPACK_PROJECT_CONFIG_FILE ${CMAKE_SOURCE_DIR}/cmake/deb_prefix.cmake)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_COMPRESSION_TYPE xz)
set(CPACK_DEBIAN_PACKAGE_MAINTAINER "the kava authors")
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "libc6 (>= 2.34), libgcc-s1, libstdc++6 (>= 12)")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "bash-completion, libedit2, man-db, openmpi-bin")
include(CPack)

# No program and no library but the cuda backend's module may name a library of CUDA: programs run where there is none.
if(KAVA_TESTS)
  add_test(NAME no_program_names_a_cuda_library
           COMMAND sh -c "for file in '${CMAKE_BINARY_DIR}'/bin/*; do \
if readelf -d \"$file\" | grep NEEDED | grep -Ei 'lib(cu|nv|nccl)'; then echo \"named by $file\"; exit 1; fi; done")
endif()
